import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lead_ds.config import Config
from lead_ds.data.batches import Batches, Window
from lead_ds.data.groups.group import Group
from lead_ds.data.groups.open import open_groups
from lead_ds.data.reads import ModelBatch
from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.errors import InputError, RunError
from tests.helpers.batches import windows_of


def batches(config: Config, rank: int = 0, world: int = 1, groups: Any = None) -> Batches:
    return windows_of(config, Ranks(rank, rank, world, torch.device("cpu")), groups)


def tensors(window: Window) -> Iterator[torch.Tensor]:
    for batch in [*window.student, *window.teachers[0]]:
        for tokens in (batch.queries, batch.passages, batch.pairs):
            if tokens is not None:
                yield from tokens.values()
    yield window.passage_keys
    yield window.positive_keys


def same(a: Window, b: Window) -> bool:
    if (a.step, a.epoch, a.query_ids, a.passage_ids) != (b.step, b.epoch, b.query_ids, b.passage_ids):
        return False
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(tensors(a), tensors(b), strict=True))


def words(encoder: TextEncoder, tokens: dict[str, torch.Tensor]) -> list[str]:
    return [encoder.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens["input_ids"]]


def test_a_window_is_what_its_groups_say(config: Callable[..., Config]) -> None:
    settings = config()
    read, groups = batches(settings), open_groups(settings.data)
    for step in (0, 3, 4, 9):
        window = read.window(step)
        epoch = step // read.steps_per_epoch
        drawn = [groups.draw(int(row), settings.seed, epoch) for row in read.rows(step)]
        assert (window.step, window.epoch, window.group_size) == (step, epoch, 4)
        assert window.query_ids == [group.query_id for group in drawn]
        assert window.passage_ids == [name for group in drawn for name in group.passage_ids]
        assert window.passage_keys.tolist() == [key for group in drawn for key in group.keys]
        assert window.positive_keys.tolist() == [group.positive_keys.tolist() for group in drawn]
        assert len(window.student) == 2
        for i, batch in enumerate(window.student):
            own = drawn[2 * i : 2 * i + 2]
            assert batch.group_size == 4
            assert batch.pairs is None
            assert batch.queries is not None
            assert batch.passages is not None
            expected = read.student.encoder.queries([group.query for group in own])
            assert torch.equal(batch.queries["input_ids"], expected["input_ids"])
            expected = read.student.encoder.passages([text for group in own for text in group.passages])
            assert torch.equal(batch.passages["input_ids"], expected["input_ids"])
        [teacher] = window.teachers[0]  # null batch_size: the whole window at once
        assert teacher.queries is None
        assert teacher.pairs is not None
        assert len(teacher.pairs["input_ids"]) == 16
        first = words(read.teachers["teacher"].encoder, teacher.pairs)[5]
        assert first.startswith(drawn[1].query)


def test_an_epoch_visits_every_group_once_and_the_next_in_another_order(config: Callable[..., Config]) -> None:
    read = batches(config(batch_size=3, accumulation=1))
    assert read.steps_per_epoch == 6
    epochs = [[int(row) for step in range(e * 6, e * 6 + 6) for row in read.rows(step)] for e in range(3)]
    assert all(sorted(epoch) == list(range(18)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    uneven = batches(config(batch_size=4, accumulation=1))
    assert uneven.steps_per_epoch == 4
    rows = [int(row) for step in range(4) for row in uneven.rows(step)]
    assert len(set(rows)) == 16
    assert uneven.window(4).epoch == 1


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_see_what_one_process_with_a_larger_batch_sees(
    config: Callable[..., Config], world: int
) -> None:
    alone = batches(config(batch_size=2 * world, accumulation=1))
    ranks = [batches(config(batch_size=2, accumulation=1), rank, world) for rank in range(world)]
    assert {rank.steps_per_epoch for rank in ranks} == {alone.steps_per_epoch}
    for step in range(2 * alone.steps_per_epoch):
        parts = [rank.window(step) for rank in ranks]
        whole = alone.window(step)
        assert [name for part in parts for name in part.query_ids] == whole.query_ids
        assert [name for part in parts for name in part.passage_ids] == whole.passage_ids


def test_micro_batches_of_ranks_lie_side_by_side(config: Callable[..., Config]) -> None:
    alone = batches(config(batch_size=4, accumulation=2))
    ranks = [batches(config(batch_size=2, accumulation=2), rank, 2) for rank in range(2)]
    for step in range(2):
        rows = alone.rows(step).reshape(2, 4)
        assert [rank.rows(step).tolist() for rank in ranks] == [
            [*rows[0, :2], *rows[1, :2]],
            [*rows[0, 2:], *rows[1, 2:]],
        ]


def test_a_run_resumes_where_it_stopped_whatever_prepares_it(config: Callable[..., Config]) -> None:
    threaded = batches(config())
    whole = list(threaded.windows(0, 7))
    assert [window.step for window in whole] == list(range(7))
    assert all(same(a, b) for a, b in zip(threaded.windows(4, 7), whole[4:], strict=True))
    random_state = torch.random.get_rng_state()
    worked = list(batches(config(workers=2)).windows(2, 7))
    assert all(same(a, b) for a, b in zip(worked, whole[2:], strict=True))
    assert torch.equal(torch.random.get_rng_state(), random_state)  # the training's own draws are untouched
    assert list(threaded.windows(5, 5)) == []
    assert len(list(threaded)) == threaded.steps_per_epoch
    assert not same(whole[0], whole[1])


def test_seeds_give_other_windows(config: Callable[..., Config]) -> None:
    settings = config()
    other = batches(settings.model_copy(update={"seed": 8}))
    assert other.window(0).query_ids != batches(settings).window(0).query_ids


@pytest.mark.parametrize(("size", "chunks"), [(None, 1), (1, 6), (4, 6), (11, 3), (12, 2), (1000, 1)])
def test_the_teacher_reads_whole_groups_in_chunks(config: Callable[..., Config], size: int | None, chunks: int) -> None:
    read = batches(config(teacher={"batch_size": size}, batch_size=3))
    window = read.window(0)
    assert len(window.teachers[0]) == chunks
    rows = [len(chunk.pairs["input_ids"]) for chunk in window.teachers[0] if chunk.pairs]
    assert sum(rows) == 24
    assert all(count % 4 == 0 and count <= max(size or 24, 4) for count in rows)


@pytest.mark.parametrize("kind", ["dual_encoder", "colbert", "llm_reranker"])
def test_each_kind_of_teacher_reads_its_own_tokens(
    config: Callable[..., Config], tokenizer: Callable[..., str], kind: str
) -> None:
    more = {"max_length": 200, "template": "plain"} if kind == "llm_reranker" else {}
    teacher = {"kind": kind, "path": tokenizer("bpe"), **more}
    read = batches(config(teacher=teacher))
    [chunk] = read.window(0).teachers[0]
    assert (chunk.pairs is None) == (kind != "llm_reranker")
    if chunk.queries is not None and chunk.passages is not None:
        assert (len(chunk.queries["input_ids"]), len(chunk.passages["input_ids"])) == (4, 16)
        assert ("score_mask" in chunk.passages) == (kind == "colbert")


def test_without_a_teacher(config: Callable[..., Config]) -> None:
    read = batches(config().model_copy(update={"teacher": None}))
    assert read.window(0).teachers == []


def test_batches_move_to_a_device(config: Callable[..., Config]) -> None:
    batch = batches(config()).window(0).student[0]
    moved = batch.to("meta")
    assert isinstance(moved, ModelBatch)
    assert moved.queries is not None
    assert {tensor.device.type for tensor in moved.queries.values()} == {"meta"}
    assert moved.pairs is None


def test_fewer_groups_than_a_step_takes(config: Callable[..., Config]) -> None:
    batches(config(batch_size=3, accumulation=3), world=2)
    with pytest.raises(InputError, match=r"has 18 groups, a step takes .* 2 \* 2 \* 5 = 20 .*lower train.batch_size"):
        batches(config(batch_size=5, accumulation=2), world=2)


class Breaking:
    """Groups of which one cannot be drawn."""

    def __init__(self, groups: Any, action: str) -> None:
        self.groups, self.action = groups, action
        self.path, self.has_scores, self.identical, self.short, self.alone = groups.path, True, 0, 0, False
        self.drawn = 0

    def __len__(self) -> int:
        return len(self.groups)

    def draw(self, row: int, seed: int, epoch: int) -> Group:
        self.drawn += 1
        if epoch == 1:
            if self.action == "die":
                os._exit(9)
            bad = InputError("file:3", "is wrong", "mend it")
            raise {"input": bad, "bug": RuntimeError("the bug"), "disk": OSError("the disk")}[self.action]
        return self.groups.draw(row, seed, epoch)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_goes_wrong_ahead_is_raised_as_it_is_in_its_turn(config: Callable[..., Config], workers: int) -> None:
    settings = config(workers=workers)
    read = batches(settings, groups=Breaking(open_groups(settings.data), "input"))
    windows = read.windows(0, 10)
    assert [next(windows).step for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(InputError) as caught:
        next(windows)
    assert (caught.value.where, caught.value.what, caught.value.remedy) == ("file:3", "is wrong", "mend it")
    for action, kind in (("bug", RuntimeError), ("disk", OSError)):
        buggy = batches(settings, groups=Breaking(open_groups(settings.data), action))
        with pytest.raises(kind, match=f"the {action}"):
            list(buggy.windows(0, 10))


def test_a_worker_that_dies_is_told(config: Callable[..., Config]) -> None:
    settings = config(workers=2)
    read = batches(settings, groups=Breaking(open_groups(settings.data), "die"))
    with pytest.raises(RunError, match=r"data.workers: a data-loader worker died"):
        list(read.windows(0, 10))


def test_a_loop_that_stops_early_leaves_no_thread(config: Callable[..., Config]) -> None:
    settings = config()
    counted = Breaking(open_groups(settings.data), "input")
    windows = batches(settings, groups=counted).windows(0, 4)
    next(windows)
    windows.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "lead-ds-batches"]
    assert counted.drawn <= 16
