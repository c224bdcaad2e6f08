"""`lead-ds inspect`: how a model is read, before a run of days depends on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from lead_ds.cli.options import SETTINGS, check_settings, choice

_SAMPLE = 1000
_QUERY = "which thing has three hearts"
_PASSAGE = "The octopus has three hearts and blue blood."
_STYLES = {"special": "magenta", "prompt": "cyan", "expansion": "yellow", "text": ""}


def inspect(
    model: str = typer.Argument(
        ..., help="A student, sentence-transformers or Hugging Face directory, or a hub name.", metavar="MODEL"
    ),
    settings: list[str] | None = SETTINGS,
    kind: str | None = typer.Option(None, "--kind", help="A kind of model; default: what the model's files say."),
    data: Path | None = typer.Option(
        None, "--data", help="Show its texts, and the share of a sample of 1,000 queries and passages that is cut."
    ),
    compare: bool = typer.Option(
        False, "--compare", help="Embed 16 texts with sentence-transformers too; exit status 1 where vectors differ."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """How a model is read: kind and why, structure, prompts, lengths, similarity, dtype, and the tokens of a text.

    It loads the weights, so that it refuses what a run would refuse, in the same line.

    lead-ds inspect intfloat/e5-base-v2 --data data/scifact

    lead-ds inspect models/reranker --kind llm_reranker yes_token=yes no_token=no --json
    """
    from lead_ds.models.as_read import check_room, cut_share
    from lead_ds.models.inspection import inspect_model, shown

    if kind is not None:
        from lead_ds.models.kinds.kind import KINDS

        choice("--kind", kind, *KINDS)
    queries, passages = _texts(data) if data is not None else ([], [])
    given = [*(["dtype=fp32"] if compare else []), *check_settings(settings)]
    found = inspect_model(model, given, kind)
    # Texts that differ from their first token on: enough to see whether anything is left of them.
    check_room(found.encoder, "", queries or ["which", "whose"], passages or [_PASSAGE, _PASSAGE[::-1]])
    facts = dict(found.facts)
    query, passage = next(iter(queries), _QUERY), next(iter(passages), _PASSAGE)
    facts["tokens"] = shown(found.encoder, query, passage)
    facts["cut"] = cut_share(found.encoder, queries, passages) if data is not None else None
    facts["compared"] = None
    if compare:
        from lead_ds.models.reference import TEXTS
        from lead_ds.models.reference import compare as compare_with_reference

        half = len(TEXTS) // 2
        own = [*queries[: half // 2], *passages[: half // 2]]
        texts = [*own, *TEXTS[len(own) :]]  # the longest and the strangest stay
        facts["compared"] = compare_with_reference(found.scorer, found.encoder, texts)
    if as_json:
        print(json.dumps(facts, indent=1, ensure_ascii=False))
    else:
        _show(facts)
    if compare and not facts["compared"]["equal"]:
        raise typer.Exit(1)


def _texts(data: Path) -> tuple[list[str], list[str]]:
    """Queries and passages of a dataset."""
    from lead_ds.data.collections.dataset import Dataset

    return Dataset.open(data).sample(_SAMPLE)


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(facts):
        table.add_row(name, value if isinstance(value, Text) else Text(value))
    Console().print(table)


def _lines(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    """What a person reads: a name and a line."""
    lines: list[tuple[str, Any]] = [
        ("model", facts["path"]),
        ("kind", f"{facts['kind']} ({facts['kind_from']})"),
        ("architecture", f"{facts['architecture']}, {facts['layers']} layers, {facts['width']} wide"),
        (
            "weights",
            f"{facts['parameters']:,} parameters, {', '.join(facts['weights'])}, read here as {facts['read_as']}",
        ),
        ("modules", ", ".join(facts["modules"]) or "none behind the transformer"),
    ]
    adapter = facts["adapter"]
    if adapter is not None:
        more = "".join(f", {name}" for name in adapter["with"])
        rank = "" if adapter["r"] is None else f" of rank {adapter['r']}"
        lines.append(("adapter", f"{adapter['type']}{rank}{more}, merged into {adapter['base']}"))
    if facts["pooling"] is not None:
        lines.append(("pooling", facts["pooling"]))
    if facts["vector_width"] is not None:
        unit = "unit length" if facts["normalize"] else "not of unit length"
        lines.append(("vectors", f"{facts['vector_width']} wide, {unit}"))
    similarity = facts["similarity"]
    if similarity is not None:
        named = f"its files name {similarity['files']}" if similarity["files"] else "its files name none"
        lines.append(("similarity", f"{similarity['computed']}; {named}"))
    lines += [(f"{side} prompt", repr(prompt)) for side, prompt in facts["prompts"].items()]
    if facts["template"] is not None:
        lines.append(("template", repr(facts["template"])))
    for name, length in facts["lengths"].items():
        lines.append((name, f"{length['tokens']} tokens ({length['from']})"))
    said = {"its files": facts["files_length"], "positions": facts["positions"]}
    lines.append(("at most", ", ".join(f"{n} by {who}" for who, n in said.items() if n is not None) or "not said"))
    tokenizer = facts["tokenizer"]
    speed = "fast" if tokenizer["fast"] else "slow"
    lines.append(("tokenizer", f"{tokenizer['class']} ({speed}), {tokenizer['vocabulary']} tokens"))
    if not facts["can_be_student"]:
        lines.append(("as a student", f"refused: a {facts['kind']} is a frozen teacher only"))
    lines += [(side, _tokens(tokens)) for side, tokens in facts["tokens"].items()]
    for side, cut in (facts["cut"] or {}).items():
        line = f"{cut['cut']:.1%} of {cut['texts']:,} are longer than {cut['length']} tokens; "
        lines.append(
            (f"{side} cut", line + f"{cut['lost']:.1%} of all tokens are lost; the longest has {cut['longest']:,}")
        )
    lines += [("note", note) for note in facts["notes"]]
    compared = facts["compared"]
    if compared is not None:
        verdict = "equal" if compared["equal"] else "DIFFERENT"
        line = f"{verdict}: largest difference {compared['difference']:.1e} of {compared['texts']} texts to "
        line += f"{compared['reference']}, at most {compared['tolerance']:.1e}"
        lines.append(
            ("compared", line + ("" if compared["by_its_files"] else " (its own defaults: it saved no files)"))
        )
    return lines


def _tokens(tokens: list[tuple[str, str]]) -> Any:
    """Tokens in a line, coloured by their role."""
    from rich.text import Text

    line = Text()
    for token, role in tokens[:64]:
        line.append(token, _STYLES[role]).append(" ")
    return line.append("...") if len(tokens) > 64 else line


def add_commands(app: typer.Typer) -> None:
    """Register this file's command."""
    app.command()(inspect)
