"""How a model reads texts, as facts and as one line: what `inspect`, a run and the commands over a model say of it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from lead_ds.data.groups.group import Groups
from lead_ds.data.reads import refuse_voided
from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.errors import InputError
from lead_ds.models.dtypes import dtype_of, published_in, setting_name
from lead_ds.models.files import read_json
from lead_ds.models.kinds.kind import Kind
from lead_ds.models.load import LENGTHS

SAMPLE = 256  # texts of the data that are looked at
_WHOLE = 1 << 30  # longer than any text: nothing is cut
_FEW = 8  # tokens of a text that a prompt must leave


def reading_of(scorer: Kind, encoder: TextEncoder) -> dict[str, Any]:
    """Kind, pooling, prompts, lengths, similarity and dtype, as JSON can hold them."""
    return {
        "kind": scorer.name,
        "pooling": getattr(scorer, "pooling", None),
        "normalize": getattr(scorer, "normalize", None),
        "prompts": {"query": encoder.query_prompt, "passage": encoder.passage_prompt},
        "template": next((str(how) for name in ("template", "message") if (how := getattr(encoder, name, None))), None),
        "lengths": {name: getattr(encoder, name) for name in LENGTHS if name in scorer.Settings.model_fields},
        "similarity": similarity_of(scorer),
        "read_as": dtype_of(scorer),
        "published_in": published_in(scorer.config.path) if hasattr(scorer, "chain") else None,  # not one's own module
    }


def reading_line(scorer: Kind, encoder: TextEncoder, queries: Sequence[str], passages: Sequence[str]) -> str:
    """`reading_of` in one line, with the shares of some texts of the data that are cut; of pairs, query i with passage i."""
    facts = reading_of(scorer, encoder)
    parts = [str(facts["kind"])]
    if facts["pooling"] is not None:
        parts.append(f"pooling {facts['pooling']}")
    prompts = {side: prompt for side, prompt in facts["prompts"].items() if prompt}
    parts += [f"{side} prompt {prompt!r}" for side, prompt in prompts.items()]
    if facts["template"] is not None:
        shown = textwrap.shorten(facts["template"], 60, placeholder=" ...")
        parts.append(f"template {shown!r}")
    parts.append(" and ".join(f"{name} {tokens}" for name, tokens in facts["lengths"].items()))
    if facts["similarity"] is not None:
        parts.append(compared_by(scorer, facts["similarity"]["computed"]))
    published = setting_name(facts["published_in"] or facts["read_as"])
    parts.append(facts["read_as"] + (f", published in {published}" if published != facts["read_as"] else ""))
    cut = {} if encoder.tokenizer is None else cut_share(encoder, queries, passages)
    shares = [f"{some['cut']:.1%} of {some['texts']} {side}" for side, some in cut.items() if some["texts"]]
    if shares:
        parts.append(f"cut: {' and '.join(shares)}")
    return f"{scorer.config.path}: {'; '.join(parts)}"


def sample(groups: Groups) -> tuple[list[str], list[str]]:
    """Queries of training groups, at even distances, and a passage of each; of texts alone, those of either role."""
    rows = [int(row) for row in np.linspace(0, len(groups) - 1, min(SAMPLE, len(groups)))]
    if groups.alone:
        drawn = [groups.draw(row, seed=0, epoch=0) for row in rows]
        texts = [[one.passages[0] for one in drawn if one.role == role] for role in ("query", "passage")]
        return texts[0], texts[1]
    pools = [groups.pool(row) for row in rows]
    passages = [pool.passages[i % len(pool.passages)] for i, pool in enumerate(pools)]
    return [pool.query for pool in pools], passages


def check_room(encoder: TextEncoder, where: str, queries: Sequence[str] = (), passages: Sequence[str] = ()) -> None:
    """Raise InputError where a prompt or a template leaves too little of a text, or nothing is left of some texts of the data.

    where: whose lengths these are."""
    for name, left in room(encoder).items():
        if left < _FEW:
            length, by = getattr(encoder, name), "template" if encoder.template or encoder.message else "prompt"
            what = f"is {length}, and its {by} leaves {max(left, 0)} tokens of a text"
            key = ".".join(filter(None, [where, name]))
            raise InputError(key, what, f"raise it to {length - left + _FEW} at least, or shorten the prompt")
    if encoder.tokenizer is not None:
        refuse_voided(encoder, queries, passages, where)


def room(encoder: TextEncoder) -> dict[str, int]:
    """Tokens that are left for a text, or the two of a pair, by the name of their length; where a prompt takes some."""
    prompts = {"queries": encoder.query_prompt, "passages": encoder.passage_prompt}
    if encoder.tokenizer is None or not (any(prompts.values()) or encoder.template or encoder.message):
        return {}
    whole = replace(encoder, query_length=_WHOLE, passage_length=_WHOLE, max_length=_WHOLE)
    if encoder.reads_pairs:
        return {"max_length": encoder.max_length - len(whole.pair_rows([""], [""])[0][0])}
    left: dict[str, int] = {}
    if prompts["queries"] or encoder.message:
        left["query_length"] = encoder.query_length - len(whole.rows([""], "queries")[0][0])
    if prompts["passages"] or encoder.message:
        left["passage_length"] = encoder.passage_length - len(whole.rows([""], "passages")[0][0])
    return left


def cut_share(encoder: TextEncoder, queries: Sequence[str], passages: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of texts, or of the pairs that query i and passage i make: how many are cut, and of how many tokens.

    `tokens` counts prompts and special tokens too; `lost` is the share of all tokens that is cut.
    """
    whole = replace(encoder, query_length=_WHOLE, passage_length=_WHOLE, max_length=_WHOLE)
    if encoder.reads_pairs:
        pairs = min(len(queries), len(passages))
        rows = whole.pair_rows(list(queries[:pairs]), list(passages[:pairs]))[0] if pairs else []
        return {"pairs": _cut(rows, encoder.max_length)}
    found: dict[str, dict[str, Any]] = {}
    sides: tuple[tuple[Literal["queries", "passages"], Sequence[str], int], ...] = (
        ("queries", queries, encoder.query_length),
        ("passages", passages, encoder.passage_length),
    )
    for side, texts, length in sides:
        found[side] = _cut(whole.rows(list(texts), side)[0] if texts else [], length)
    return found


def similarity_of(scorer: Kind) -> dict[str, Any] | None:
    """Of a kind that gives vectors: what its files name, and by what they are compared here."""
    if not scorer.gives_vectors:
        return None
    files = hasattr(scorer, "chain")  # a module of one's own has none
    named = (
        read_json(scorer.config.path, "config_sentence_transformers.json").get("similarity_fn_name") if files else None
    )
    return {"files": named, "computed": getattr(scorer, "similarity", "cosine" if scorer.unit else "dot")}


def compared_by(scorer: Kind, served: str) -> str:
    """By what its relevance is compared in a run: what it serves, unless `scale` of its section says otherwise."""
    scale = getattr(scorer.config, "scale", "none")
    if scale in ("none", served):
        return served
    named = "z-scores" if scale == "standard" else scale
    final = getattr(scorer, "final_scale", scale) == scale
    return f"{named} by its scale, {served} where it serves" if final else f"{served}, layers by {named}"


def _cut(rows: Sequence[Any], length: int) -> dict[str, Any]:
    tokens = [len(row) for row in rows]
    over = [n for n in tokens if n > length]
    return {
        "texts": len(tokens),
        "length": length,
        "cut": len(over) / max(len(tokens), 1),
        "tokens": sum(tokens),
        "lost": sum(n - length for n in over) / max(sum(tokens), 1),
        "longest": max(tokens, default=0),
    }
