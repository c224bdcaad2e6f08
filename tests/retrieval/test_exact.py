"""Exact search against brute force and FAISS."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lead_ds.retrieval import exact
from lead_ds.retrieval.exact import exact_search, merge_top_k


def data(queries: int = 7, passages: int = 101, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(queries, width, generator=generator), torch.randn(passages, width, generator=generator)


@pytest.mark.parametrize("k", [1, 10, 101])
def test_brute_force(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, passages = data()
    expected = (queries @ passages.T).sort(dim=1, descending=True)
    monkeypatch.setattr(exact, "QUERY_BLOCK", 3)
    blocks = [passages[:5], passages[5:6], passages[6:].numpy()]
    for given in (passages, passages.numpy(), blocks):
        scores, rows = exact_search(queries, given, k)
        assert torch.equal(rows, expected.indices[:, :k])
        torch.testing.assert_close(scores, expected.values[:, :k])


@pytest.mark.parametrize("order", ["as drawn", "best last", "equal", "best first"])
@pytest.mark.parametrize("k", [1, 20, 300])
def test_later_blocks_add_what_is_better_and_nothing_else(k: int, order: str) -> None:
    queries, passages = data(5, 4000)
    if order != "as drawn":
        passages = passages[(passages @ queries[0]).argsort(descending=order == "best first")]
    if order == "equal":
        passages = passages[torch.arange(4000) % 7]
    blocks = [passages[:700], passages[700:710], passages[710:2758], passages[2758:]]
    scores, rows = exact_search(queries, blocks, k)
    every = queries @ passages.T
    expected = every.sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(scores, expected.values[:, :k])
    torch.testing.assert_close(every.gather(1, rows), scores)
    assert all(len(set(row)) == k for row in rows.tolist())
    if order != "equal":
        assert torch.equal(rows, expected.indices[:, :k])


@pytest.mark.parametrize("row", [3, 3000])
def test_a_score_that_is_not_a_number_is_seen(row: int) -> None:
    queries, passages = data(5, 4000)
    passages[row] = torch.nan
    scores, rows = exact_search(queries, passages.split(1000), 300)
    assert (rows == row).any(1).all()
    assert scores.isnan().any(1).all()


def test_k_beyond_the_corpus_gives_the_whole_corpus() -> None:
    queries, passages = data(passages=4)
    scores, rows = exact_search(queries, passages, 10)
    assert scores.shape == rows.shape == (7, 4)
    assert rows.sort(dim=1).values.tolist() == [[0, 1, 2, 3]] * 7


def test_memory_maps_in_float16(tmp_path) -> None:  # type: ignore[no-untyped-def]
    queries, passages = data()
    np.save(tmp_path / "p.npy", passages.numpy().astype(np.float16))
    _, rows = exact_search(queries, np.load(tmp_path / "p.npy", mmap_mode="r"), 5)
    expected = (queries @ passages.half().float().T).topk(5).indices
    assert torch.equal(rows, expected)


def test_faiss_finds_the_same() -> None:
    faiss = pytest.importorskip("faiss")
    queries, passages = data()
    index = faiss.IndexFlatIP(16)
    index.add(passages.numpy())
    expected_scores, expected_rows = index.search(queries.numpy(), 10)
    scores, rows = exact_search(queries, passages, 10)
    assert rows.tolist() == expected_rows.tolist()
    torch.testing.assert_close(scores, torch.from_numpy(expected_scores))


def test_merging_breaks_ties_by_row() -> None:
    first = torch.tensor([[2.0, 1.0]]), torch.tensor([[7, 9]])
    second = torch.tensor([[2.0, 1.0]]), torch.tensor([[3, 4]])
    scores, rows = merge_top_k([first, second], 3)
    assert scores.tolist() == [[2.0, 2.0, 1.0]]
    assert rows.tolist() == [[3, 7, 4]]
