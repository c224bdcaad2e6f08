"""The card of a model's directory: how it is named, found and used."""

from __future__ import annotations

import yaml

from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.models.kinds.kind import Kind, Use


def front_matter(use: Use, *more: str) -> list[str]:
    """The card's YAML header, with tags of the kind and `more`."""
    header = {"library_name": use.library, "pipeline_tag": use.task, "tags": [*use.tags, *more, "lead-ds"]}
    return ["---", yaml.safe_dump(header, sort_keys=False).strip(), "---", ""]


def plain_card(scorer: Kind, encoder: TextEncoder) -> str:
    """README.md of a model of which no run is known."""
    facts = [f"layers: {scorer.num_layers}", f"hidden size: {scorer.width}", *scorer.facts(encoder)]
    lines = [*front_matter(scorer.use), f"# A {scorer.use.name} trained with lead-ds", "", *(f"- {x}" for x in facts)]
    return "\n".join([*lines, "", "```python", scorer.use.example, "```", ""])
