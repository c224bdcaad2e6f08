"""The largest difference of a format to its reference, as a teacher, as a student, by `encode` and by `evaluate`."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lead_ds.config import StudentConfig, TeacherConfig
from lead_ds.errors import InputError
from lead_ds.models.labels import relevance_logit
from lead_ds.models.load import kind_of, load_encoder, load_scorer, load_student, load_teacher, load_text
from lead_ds.models.reference import TEXTS, TOLERANCE
from lead_ds.retrieval.encode import encode_share
from lead_ds.settings.parse import apply_override
from tests.formats.format import Format

READERS = ("teacher", "student", "encode", "evaluate")
TEXT = [*TEXTS, ""]
NEXT = [*TEXT[1:], TEXT[0]]
Read = dict[str, list[Tensor]]


def measured(form: Format, folder: Path) -> dict[str, float | str]:
    """By reader: the difference, relative to the largest value or to 1; or the line by which the format is refused there.

    Raises AssertionError where a format is refused in other words than expected, or in some places only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = form.write(folder)
    never = form.refused is not None and not form.not_as_student
    expected = None if never else _expected(form, path, _opened(form, path)[0])
    found: dict[str, float | str] = {}
    for reader, read in _readers(form).items():
        late = expected is not None and not form.pairs and not _opened(form, path)[0].gives_vectors
        if (reader == "encode" and (form.pairs or late)) or (
            reader == "student" and _kind(form, path) == "llm_reranker"
        ):
            found[reader] = "-"
        else:
            no = expected is None or (form.not_as_student and reader == "student")
            found[reader] = _refused(form, path, read) if no else _gap(read(path), expected or {})
    return found


def equal(value: float | str) -> bool:
    """Whether a difference is none to speak of."""
    return isinstance(value, str) or value <= TOLERANCE


def _readers(form: Format) -> dict[str, Callable[[str], Read]]:
    return {
        "teacher": lambda path: _trained(form, path, TeacherConfig),
        "student": lambda path: _trained(form, path, StudentConfig),
        "encode": lambda path: _encoded(form, path),
        "evaluate": lambda path: _said(*_opened(form, path)),
    }


def _kind(form: Format, path: str) -> str:
    if form.kind is not None:
        return form.kind
    try:
        return kind_of(path)
    except InputError:
        return "dual_encoder"


@lru_cache(1)
def _opened(form: Format, path: str) -> tuple[Any, Any]:
    """As `evaluate` does."""
    return load_scorer(path, form.kind, form.settings)


@torch.no_grad()
def _said(scorer: Any, encoder: Any) -> Read:
    """What a scorer gives for the texts."""
    if scorer.reads_pairs:
        return {"pairs": list(scorer(tokens=encoder.pairs(TEXT, NEXT)))}
    found = {}
    for side, tokens in (("queries", encoder.queries(TEXT)), ("passages", encoder.passages(TEXT))):
        said, counts = scorer(tokens=tokens), tokens.get("score_mask")
        found[side] = [x if counts is None else x[counts[i].bool()] for i, x in enumerate(said)]
    return found


def _trained(form: Format, path: str, role: Any) -> Read:
    """As a run's teacher or student, before its first step."""
    scorer, _ = _opened(form, path)
    tree = _tree(form, scorer.Settings)
    section = role.read({"kind": scorer.name, "path": path, **tree})
    load = load_teacher if role is TeacherConfig else load_student
    return _said(load(section, torch.float32).eval(), load_text(section))


def _encoded(form: Format, path: str) -> Read:
    scorer, encoder = load_encoder(path, form.settings)
    found: Read = {}
    for side, kind in (("queries", "queries"), ("passages", "corpus")):
        rows = range(len(TEXT))
        found[side] = list(encode_share(scorer.embed, encoder, kind, lambda rows: [TEXT[i] for i in rows], rows))  # type: ignore[arg-type]
    return found


def _tree(form: Format, section: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for setting in form.settings:
        apply_override(tree, setting, section)
    return tree


@torch.no_grad()
def _expected(form: Format, path: str, scorer: Any) -> Read:
    """What the reference gives, one text at a time."""
    if form.reference is not None:
        said = list(form.reference(path, TEXT, NEXT))
        return {"pairs": said} if form.pairs else {"queries": said, "passages": said}
    import sentence_transformers

    trusted = bool(scorer.config.trust_remote_code)
    how: dict[str, Any] = {"model_kwargs": {"dtype": torch.float32}, "trust_remote_code": trusted}
    model = getattr(sentence_transformers, scorer.family)(path, device="cpu", **how)
    if scorer.reads_pairs:
        pairs = list(zip(TEXT, NEXT, strict=True))
        plain = {"batch_size": 1, "activation_fn": torch.nn.Identity(), "convert_to_tensor": True}
        logits = model.predict(pairs, **plain)
        return {"pairs": list(logits if logits.dim() == 1 else relevance_logit(logits, scorer.relevant))}
    tokenizer = model[0].tokenizer
    # The reference fails at an empty text whose tokenizer adds nothing.
    texts = TEXT if not callable(tokenizer) or tokenizer("")["input_ids"] else TEXT[:-1]
    return {
        "queries": [_whole(x) for x in model.encode_query(texts, batch_size=1)],
        "passages": [_whole(x) for x in model.encode_document(texts, batch_size=1)],
    }


def _whole(x: Any) -> Tensor:
    """With its zeros, where it is sparse."""
    vector = torch.as_tensor(x)
    return vector.to_dense() if vector.is_sparse else vector


def _gap(ours: Read, theirs: Read) -> float:
    gap, size = torch.zeros(()), torch.ones(())
    for side, expected in theirs.items():
        for mine, own in zip(ours[side], expected, strict=False):
            if mine.shape != own.shape:
                return float("inf")
            if own.numel():
                gap = torch.maximum(gap, (mine.float() - own.float()).abs().max())  # NaN stays NaN
                size = torch.maximum(size, own.float().abs().max())
    return float(gap / size)


def _refused(form: Format, path: str, read: Callable[[str], Read]) -> str:
    try:
        read(path)
    except InputError as error:
        line = str(error)
        assert "\n" not in line
        assert re.search(form.refused or "", line), f"{form.name}: {line}"
        return "refused"
    raise AssertionError(f"{form.name}: is not refused")
