"""`passes: auto`: as many passes as save padding, and never another number of forwards of a sharded model."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lead_ds.data.reads import LEAST, passes_of
from lead_ds.data.tokens.passes import ENOUGH, MOST, Fewest, Tokens, in_passes, least_padding

CPU = torch.device("cpu")


def table(lengths: list[int]) -> Tokens:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": mask.long() * 7, "attention_mask": mask.long()}


LENGTHS = st.lists(st.integers(1, 96), min_size=1, max_size=40)


@given(LENGTHS, LENGTHS, st.booleans(), st.integers(1, 2000))
def test_passes_save_what_they_must(queries: list[int], passages: list[int], sharded: bool, least: int) -> None:
    tables = [table(queries), table(passages)]
    plain = sum(one["input_ids"].numel() for one in tables)
    n = Fewest(sharded, least).of(tables)
    if n is None:
        return
    made = in_passes(tables, n, least_padding, 0)
    tokens = sum(one["input_ids"].numel() for one in made.tokens)
    assert tokens <= ENOUGH * plain
    assert len(made.tokens) == min(n, len(queries) + len(passages))
    if sharded:
        assert n == 2, "as many forwards as without"
    else:
        assert 2 <= n <= MOST
        assert plain >= n * least


def test_texts_that_are_all_at_the_limit_are_not_split() -> None:
    assert Fewest(False, 1).of([table([8] * 4), table([96] * 32)]) is None
    assert Fewest(True, 1).of([table([8] * 4), table([96] * 32)]) is None


def test_natural_lengths_are() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(4, 0.5, 64), 1, 128).astype(int).tolist()
    assert Fewest(False, 256).of([table(lengths)]) == 4
    assert Fewest(True, 256).of([table(lengths)]) is None, "pairs of a sharded model: one forward, as without"
    assert Fewest(False, 10**6).of([table(lengths)]) is None, "too few to keep a device busy"


@pytest.mark.parametrize("setting", [None, 3, "packed"])
def test_what_is_set_stays(setting: int | str | None) -> None:
    assert passes_of(setting, sharded=True, tapped=True, device=CPU) == setting  # type: ignore[arg-type]


def test_attention_maps_come_whole() -> None:
    assert passes_of("auto", sharded=False, tapped=True, device=CPU) is None
    found = passes_of("auto", sharded=False, tapped=False, device=CPU)
    assert found == Fewest(False, LEAST["cpu"])
