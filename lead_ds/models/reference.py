"""A model as sentence-transformers reads it: the difference of its vectors or scores to ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.errors import InputError
from lead_ds.io.hub import hub_settings
from lead_ds.io.located import located
from lead_ds.models.files import family_of
from lead_ds.models.kinds.kind import Kind
from lead_ds.models.labels import relevance_logit
from lead_ds.models.library import sentence_transformers
from lead_ds.models.merging import unmerged
from lead_ds.models.quiet import quiet

TOLERANCE = 2e-5  # of the largest value, or of 1 where that is smaller

TEXTS = (
    "owl",
    "a",
    "which thing has three hearts",
    "What is late interaction?",
    "  blank edges and\ttabs  ",
    "first line\nsecond line\n\nfourth line",
    "Zürich ist größer als Köln, naïve façade",
    "東京は日本の首都です。",
    "Привет, мир! Как дела?",
    "مرحبا بالعالم",
    "emoji 🦉🐙 and é combined",
    "x = {'key': [1, 2.5, None]}  # code, not prose",
    "https://example.org/a/long/path?with=query&and=more#fragment",
    "The octopus has three hearts and blue blood. " * 6,
    "bread rises because yeast makes gas " * 60,
    "a long text\nof many lines\n" * 200,
)


def compare(scorer: Kind, encoder: TextEncoder, texts: Sequence[str] = TEXTS) -> dict[str, Any]:
    """The largest difference between ours and the reference's vectors, token vectors or scores of texts, in float32.

    Texts are read as queries and as passages; of a model of pairs, each with the next one. The reference reads the model's
    files alone, without settings; of an adapter those of its merged copy, its weights as peft computes them, not merged.
    equal: whether the difference is within `TOLERANCE` of the largest value (of 1 if smaller).
    Raises InputError for a kind that sentence-transformers does not read in this way.
    """
    with torch.no_grad(), quiet():
        with _one_line_errors(scorer.config.path):
            reference = _reference(scorer)
            theirs = _read(reference, texts, scorer)
        if scorer.reads_pairs:
            tokens = {"pairs": encoder.pairs(texts, _next(texts))}
        else:
            tokens = {"queries": encoder.queries(texts), "passages": encoder.passages(texts)}
        found = {side: _gap(scorer, tokens[side], theirs[side]) for side in tokens}
    scale = max(1.0, *(size for _, size in found.values()))
    difference = max(gap for gap, _ in found.values())
    return {
        "reference": type(reference).__name__,
        "texts": len(texts),
        "differences": {side: gap for side, (gap, _) in found.items()},
        "difference": difference,
        "tolerance": TOLERANCE * scale,
        "equal": difference <= TOLERANCE * scale,  # false for what is not finite
        "by_its_files": family_of(scorer.config.path) == scorer.family,
    }


def _reference(scorer: Kind) -> Any:
    path = scorer.config.path
    if scorer.use.library != "sentence-transformers" and family_of(path) != scorer.family:
        what = f"sentence-transformers has no {scorer.use.name} of this form to compare with"
        raise InputError("--compare", what, "compare it with its card's code")
    trust = bool(scorer.config.trust_remote_code)
    options: dict[str, Any] = hub_settings(path) | {"trust_remote_code": trust}
    model = getattr(sentence_transformers(), scorer.family)(
        located(path), device="cpu", model_kwargs={"dtype": torch.float32}, **options
    )
    adapted = unmerged(path, trust_remote_code=trust, allow_pickle=scorer.config.allow_pickle)
    if adapted is not None:
        inside = (adapted, adapted.base_model)  # with its head, and without
        model[0].model = next(part for part in inside if type(part) is type(model[0].model))
    if model.tokenizer.pad_token is None:  # it refuses to pad a batch of one, which needs none
        model.tokenizer.pad_token = model.tokenizer.eos_token
    return model.eval()


@contextmanager
def _one_line_errors(path: str) -> Iterator[None]:
    """Turn what sentence-transformers raises, loading or reading, into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a foreign directory can be wrong in any way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = f"sentence-transformers cannot read it: {reason[:200]}"
        raise InputError(path, what, "leave --compare out") from error


def _next(texts: Sequence[str]) -> list[str]:
    """The passage of each text's pair."""
    return [*texts[1:], texts[0]]


def _read(reference: Any, texts: Sequence[str], scorer: Kind) -> dict[str, Any]:
    """The reference's vectors or token vectors of texts, or the scores of pairs, one at a time: padding changes nothing."""
    if not scorer.reads_pairs:
        queries = reference.encode_query(list(texts), batch_size=1)
        return {"queries": queries, "passages": reference.encode_document(list(texts), batch_size=1)}
    rows = list(zip(texts, _next(texts), strict=True))
    logits = reference.predict(rows, batch_size=1, activation_fn=torch.nn.Identity(), convert_to_tensor=True)
    return {"pairs": logits if logits.dim() == 1 else relevance_logit(logits, scorer.relevant)}  # type: ignore[arg-type]


def _gap(scorer: Kind, tokens: dict[str, Tensor], theirs: Any) -> tuple[float, float]:
    """The largest difference and the largest value of what is said of texts or pairs."""
    ours = scorer(tokens=tokens)
    counts = tokens.get("score_mask")
    gap, size = torch.zeros(()), torch.zeros(())
    for i, reference in enumerate(theirs):
        expected = torch.as_tensor(reference).float()
        expected = expected.to_dense() if expected.is_sparse else expected
        mine = ours[i] if counts is None else ours[i][counts[i].bool()]
        if mine.shape != expected.shape:
            return float("inf"), float(expected.abs().max())
        gap = torch.maximum(gap, (mine - expected).abs().max())  # NaN stays NaN
        size = torch.maximum(size, expected.abs().max())
    return float(gap), float(size)
