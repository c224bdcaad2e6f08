"""Sorting texts into passes saves padding, keeps every text's features, and is the same number of passes on every rank."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lead_ds.config import TeacherConfig
from lead_ds.data.reads import ModelBatch, split
from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.data.tokens.passes import even, in_passes, least_padding
from lead_ds.models.load import load_teacher, load_text
from lead_ds.models.scorer import Scorer
from lead_ds.relevance import Features, ScoreFeatures, TokenFeatures
from tests.helpers.rooms import TEACHERS

QUERIES = ["which thing grows", "which thing has three hearts and blue blood", "fire"]
PASSAGES = [("a " * n + "glacier grinds rock").strip() for n in (3, 30, 1, 9, 17, 2, 5, 25, 11)]


def tensors(features: Features) -> list[torch.Tensor]:
    """Features as tensors, without what padding left in them."""
    if isinstance(features, ScoreFeatures):
        return [features.s_KQN]
    if isinstance(features, TokenFeatures):
        q, p = features.q_mask_QL.bool(), features.p_mask_PL.bool()
        return [features.q_KQLD[:, q], features.p_KPLD[:, p]]
    return [features.q_KQD, features.p_KPD]


def opened(rooms: Path, kind: str, **more: Any) -> tuple[Scorer, TextEncoder, ModelBatch]:
    """A teacher in float32, its tokens, and a batch of QUERIES with three of PASSAGES each."""
    lengths = {"query_length": 40, "passage_length": 64} if kind in ("dual_encoder", "colbert") else {}
    settings = TEACHERS[kind] | {"path": str(rooms / TEACHERS[kind]["path"]), **lengths, "dtype": "fp32", **more}
    config = TeacherConfig.model_validate(settings)
    teacher, encoder = load_teacher(config, torch.float32), load_text(config)
    if kind in ("cross_encoder", "llm_reranker"):
        pairs = encoder.pairs([q for q in QUERIES for _ in range(3)], PASSAGES)
        return teacher, encoder, ModelBatch(3, pairs=pairs)
    return teacher, encoder, ModelBatch(3, queries=encoder.queries(QUERIES), passages=encoder.passages(PASSAGES))


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("expansion", [False, True])
def test_features_do_not_depend_on_the_parts(rooms: Path, kind: str, expansion: bool) -> None:
    if expansion and kind != "colbert":
        pytest.skip("only ColBERT expands queries")
    teacher, encoder, batch = opened(rooms, kind, **({"query_expansion": expansion} if kind == "colbert" else {}))
    with torch.no_grad():
        plain = teacher(batch, layers=[0, 2])
        for n, cuts in ((1, least_padding), (3, least_padding), (4, even), (99, even)):
            cut = split(batch, encoder, n, cuts)
            assert cut.passes is not None
            rows = len(PASSAGES) + (0 if batch.pairs is not None else len(QUERIES))
            assert len(cut.passes.tokens) == min(n, rows)
            found = teacher(cut, layers=[0, 2])
            for name in ("final", "layers"):
                for a, b in zip(tensors(getattr(plain, name)), tensors(getattr(found, name)), strict=True):
                    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def tokens_in(lengths: np.ndarray, bounds: list[int]) -> list[int]:
    return [int(lengths[a]) * (b - a) for a, b in pairwise(bounds)]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_cuts_are_the_best_of_all(n: int) -> None:
    for seed in range(20):
        lengths = -np.sort(-np.random.default_rng(seed).integers(1, 12, 9))
        ways = [[0, *inner, len(lengths)] for inner in combinations(range(1, len(lengths)), n - 1)]
        for cuts, cost in ((least_padding, sum), (even, max)):
            bounds = cuts(lengths, n)
            assert len(bounds) == n + 1
            assert (np.diff(bounds) > 0).all()
            assert cost(tokens_in(lengths, bounds)) == min(cost(tokens_in(lengths, way)) for way in ways), (seed, cuts)


def test_order_leads_back() -> None:
    lengths = torch.tensor([2, 7, 1, 7, 3])
    mask = (torch.arange(7) < lengths[:, None]).long()
    ids = torch.arange(1, 6)[:, None] * mask
    cut = in_passes([{"input_ids": ids, "attention_mask": mask}], 3, least_padding, pad=0)
    joined = torch.cat(
        [torch.nn.functional.pad(part["input_ids"], (0, 7 - part["input_ids"].shape[1])) for part in cut.tokens]
    )
    assert torch.equal(joined[cut.order], ids)
