"""From groups to what the models read: one window per optimizer step and rank, tokenised ahead of the training loop.

Dimensions: W ranks, A micro-batches per step, B groups per micro-batch and rank, N passages per group, M known positives.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lead_ds.data.groups.by_id import IdGroups
from lead_ds.data.groups.group import Group, Groups, say_identical
from lead_ds.data.groups.mixture import Drawn, MixedGroups
from lead_ds.data.groups.shuffle import shuffled
from lead_ds.data.reads import ModelBatch, Reads, in_parts, refuse_equal, refuse_voided
from lead_ds.data.tokens.alignment import UNGROUPED, token_groups
from lead_ds.data.tokens.cache import TokenCache
from lead_ds.data.tokens.encoder import TextEncoder, Tokens
from lead_ds.errors import InputError, LeadError, RunError
from lead_ds.io.notes import say_once
from lead_ds.settings.data import DataConfig
from lead_ds.settings.train import TrainConfig

_LOOKED_AT = 32  # groups of the first window that are looked at before anything is trained
_AHEAD = 2  # windows that are ready before they are needed, per worker


class Processes(Protocol):
    """This process among those that share each step."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...


@dataclass
class Window:
    """One optimizer step of one rank: A micro-batches of B groups."""

    step: int
    epoch: int
    group_size: int  # N
    query_ids: list[str]
    passage_ids: list[str]
    student: list[ModelBatch]  # one per micro-batch
    teachers: list[
        list[ModelBatch]
    ]  # of each, batches of whole groups, equally many on every rank; of none: not read now
    passage_keys: Tensor  # int64 [A*B*N]; equal keys are the same passage
    positive_keys: Tensor  # int64 [A*B, M]; each query's known positives, padded with -1

    def pin_memory(self) -> Window:
        """The same with all tensors in page-locked memory."""
        return replace(
            self,
            student=[batch.pin_memory() for batch in self.student],
            teachers=[[batch.pin_memory() for batch in batches] for batches in self.teachers],
            passage_keys=self.passage_keys.pin_memory(),
            positive_keys=self.positive_keys.pin_memory(),
        )


class Batches:
    """The windows of a run. Stateless: window s depends on the seed and s, not on what was read before.

    Each epoch is a permutation of the groups; step s takes its next W*A*B (an incomplete rest is dropped). Of a mixture,
    each set has epochs of its own: see `lead_ds.data.groups.mixture`. Within a step, micro-batch a of rank r holds groups
    a*W*B + r*B and the next B-1. So one process with batch W*B sees the micro-batches that W processes with batch B see.
    """

    def __init__(
        self,
        groups: Groups,
        student: Reads,
        teachers: Mapping[str, Reads],
        data: DataConfig,
        train: TrainConfig,
        *,
        seed: int,
        ranks: Processes,
    ) -> None:
        """teachers: by the key of each in the configuration.

        Raises InputError when the groups are fewer than one step takes, or when their tokens cannot be kept.
        """
        self.groups, self.student, self.teachers = groups, replace(student, at_once=train.batch_size), dict(teachers)
        self.rank, self.world, self.seed = ranks.rank, ranks.world, seed
        self.batch_size, self.accumulation = train.batch_size, train.accumulation
        self.group_size = 1 + data.negatives
        self.workers = data.workers
        # The encoders of each teacher and student, where attention maps of differently tokenised texts are compared.
        self.aligned = [_aligned(teacher, student) for teacher in teachers.values()]
        step = self.world * self.batch_size * self.accumulation
        self.steps_per_epoch = len(groups) // step
        if self.steps_per_epoch == 0:
            parts = f"{self.world} * {self.accumulation} * {self.batch_size} = {step}"
            raise InputError(
                groups.path,
                f"has {len(groups)} groups, a step takes processes * accumulation * batch_size = {parts}",
                "lower train.batch_size, train.accumulation or the number of processes",
            )
        if self.rank == 0:
            say_identical(groups)
        if groups.short and self.rank == 0:
            what = f"{groups.short} of {len(groups)} groups have fewer than {data.negatives} negatives of their own"
            say_once(f"{groups.path.name}: {what} that are no positives: random passages fill them")
        self._draw: Callable[..., Group] = groups.draw
        self._last = max(1, train.steps - 1) if data.schedule else None  # the step at which a schedule ends
        if data.token_cache:
            self._keep_tokens(data.token_cache)

    def _keep_tokens(self, place: bool | str) -> None:
        """Read tokens instead of texts, of every model for which that is the same."""
        self.student = self._kept(self.student, place)
        self.teachers = {key: self._kept(teacher, place) for key, teacher in self.teachers.items()}
        texts = any(model.reads_texts for model in (self.student, *self.teachers.values()))
        if not texts and not any(self.aligned) and isinstance(self.groups, IdGroups):
            self._draw = partial(self.groups.draw, texts=False)

    def _kept(self, model: Reads, place: bool | str) -> Reads:
        if model.encoder is None:
            return model
        return replace(model, tokens=TokenCache.open(place, self.groups, model.encoder, rank=self.rank))

    def check(self, compared: int) -> None:
        """Refuse settings that leave nothing of the texts, and say where nothing is compared.

        compared: groups whose passages a query is compared with. Raises InputError as `refuse_voided` and `refuse_equal`.
        """
        groups = [self.groups.draw(int(row), self.seed, 0) for row in self.rows(0)[:_LOOKED_AT]]
        if not self.groups.alone:
            spread = np.linspace(0, len(self.groups) - 1, min(_LOOKED_AT, len(self.groups))).astype(int).tolist()
            refuse_equal([self.groups.draw(row, self.seed, 0) for row in spread], self.groups.path)
        queries, passages = [group.query for group in groups], [text for group in groups for text in group.passages]
        for who, model in (("student", self.student), *self.teachers.items()):
            if model.encoder is not None:
                refuse_voided(model.encoder, queries, passages, who)
        if self.group_size * compared == 1 and self.rank == 0:
            what = "every query is compared with its positive alone: losses over passages are 0, and teach nothing"
            say_once(f"data.negatives is 0: {what} (raise it, or train.batch_size)")

    def __iter__(self) -> Iterator[Window]:
        """The first epoch."""
        return self.windows(0, self.steps_per_epoch)

    def rows(self, step: int) -> np.ndarray:
        """The groups of this rank's window of a step, micro-batch after micro-batch. int64 [A*B]."""
        return np.array([row for row, _ in self._drawn(step)], np.int64)

    def _drawn(self, step: int) -> list[Drawn]:
        """`rows`, each with its epoch: of a mixture, that of its set."""
        taken = self.world * self.accumulation * self.batch_size
        mixed = isinstance(self.groups, MixedGroups)
        epoch, position = (0, step) if mixed else divmod(step, self.steps_per_epoch)
        everyone = np.arange(position * taken, (position + 1) * taken)
        slots = everyone.reshape(self.accumulation, self.world, self.batch_size)[:, self.rank].reshape(-1).tolist()
        if isinstance(self.groups, MixedGroups):
            return self.groups.drawn(slots, self.seed, self.world * self.batch_size)
        if self.groups.alone:  # they may be too many for a permutation in memory
            return [Drawn(shuffled(slot, len(self.groups), self.seed, epoch), epoch) for slot in slots]
        order = _permutation(self.seed, epoch, len(self.groups))
        return [Drawn(int(order[slot]), epoch) for slot in slots]

    def window(self, step: int, due: bool = False) -> Window:
        """Draw and tokenise one window. due: a teacher that does not teach at this step is given nothing."""
        epoch = step // self.steps_per_epoch
        drawn = self._drawn(step)
        rows = np.array([row for row, _ in drawn], np.int64)
        part = {} if self._last is None else {"progress": min(1.0, step / self._last)}
        groups = [self._draw(row, self.seed, at, **part) for row, at in drawn]
        width = max(len(group.positive_keys) for group in groups)
        positive_keys = np.full((len(groups), width), -1, np.int64)
        for row, group in enumerate(groups):
            positive_keys[row, : len(group.positive_keys)] = group.positive_keys
        student = self.student.batches(rows, groups)
        teachers = [
            teacher.batches(rows, groups) if not due or teacher.span.holds(step) else []
            for teacher in self.teachers.values()
        ]
        for encoders, teacher in zip(self.aligned, teachers, strict=True):
            if encoders is not None and teacher:
                for *batches, some in zip(teacher, student, in_parts(groups, self.batch_size), strict=True):
                    _align(encoders, batches, some)
        return Window(
            step=step,
            epoch=epoch,
            group_size=self.group_size,
            query_ids=[group.query_id for group in groups],
            passage_ids=[name for group in groups for name in group.passage_ids],
            student=student,
            teachers=teachers,
            passage_keys=torch.from_numpy(np.concatenate([group.keys for group in groups])),
            positive_keys=torch.from_numpy(positive_keys),
        )

    def windows(self, start: int, stop: int) -> Iterator[Window]:
        """Windows start to stop-1, prepared ahead by a thread or by worker processes, in page-locked memory for CUDA.

        Raises what went wrong in the preparation; RunError when a worker process dies.
        """
        if stop <= start:
            return iter(())
        return self._by_workers(start, stop) if self.workers else self._by_thread(start, stop)

    def _by_thread(self, start: int, stop: int) -> Iterator[Window]:
        ready: queue.Queue[Window | BaseException] = queue.Queue(_AHEAD)
        closed = threading.Event()
        pin = torch.cuda.is_available()

        def offer(item: Window | BaseException) -> None:
            while not closed.is_set():
                try:
                    return ready.put(item, timeout=0.2)
                except queue.Full:
                    continue

        def prepare() -> None:
            try:
                for step in range(start, stop):
                    if closed.is_set():
                        return
                    window = self.window(step, due=True)
                    offer(window.pin_memory() if pin else window)
            except BaseException as error:  # the consumer raises it
                offer(error)

        thread = threading.Thread(target=prepare, name="lead-ds-batches", daemon=True)
        thread.start()
        try:
            for _ in range(start, stop):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            closed.set()
            thread.join()

    def _by_workers(self, start: int, stop: int) -> Iterator[Window]:
        loader: DataLoader[Any] = DataLoader(
            _Steps(self, start, stop),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=_AHEAD,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_one_thread,
            generator=torch.Generator(),  # its own: the default would draw from the training's random state
        )
        with _signals_kept():
            items = iter(loader)
        try:
            while True:
                item = next(items, None)
                if item is None:
                    return
                if isinstance(item, LeadError):
                    raise item
                yield item
        except (RuntimeError, OSError, EOFError) as error:
            # The loader itself reports a dead worker, or a read from its closed pipe fails; what a living worker raised
            # comes as "Caught ... in DataLoader worker process".
            if str(error).startswith("Caught "):
                raise
            what = f"a data-loader worker died: {(str(error) or type(error).__name__).splitlines()[0]}"
            remedy = "it may lack memory: lower data.workers, or set data.workers: 0"
            raise RunError("data.workers", what, remedy) from error
        finally:
            # Not left to the collector: a traceback keeps the iterator alive, perhaps into a later fork that breaks on it.
            items._shutdown_workers()  # type: ignore[attr-defined]


def _aligned(teacher: Reads, student: Reads) -> tuple[TextEncoder, TextEncoder] | None:
    """The encoders whose tokens are to be matched by the words that both see; None where there is nothing to match."""
    t, s = teacher.encoder, student.encoder
    if not teacher.by_words or t is None or s is None or not (teacher.texts_apart and student.texts_apart):
        return None
    return None if s.reads_like(t) else (t, s)


def _align(encoders: tuple[TextEncoder, TextEncoder], batches: Sequence[ModelBatch], groups: Sequence[Group]) -> None:
    """Add `groups` [B, L] to both models' tokens: equal numbers are the same stretch of text, -1 has no counterpart."""
    kinds: tuple[tuple[Literal["queries", "passages"], list[str]], ...] = (
        ("queries", [group.query for group in groups]),
        ("passages", [passage for group in groups for passage in group.passages]),
    )
    for kind, texts in kinds:
        (teacher, teacher_start), (student, student_start) = (encoder.spans(texts, kind) for encoder in encoders)
        pairs = [
            token_groups(text, t, s, teacher_start=teacher_start, student_start=student_start)
            for text, t, s in zip(texts, teacher, student, strict=True)
        ]
        for batch, rows in zip(batches, zip(*pairs, strict=True), strict=True):
            tokens: Tokens = getattr(batch, kind)
            table = torch.full_like(tokens["input_ids"], UNGROUPED)
            for row, numbers in enumerate(rows):
                table[row, : len(numbers)] = torch.tensor(numbers)
            tokens["groups"] = table


@lru_cache(maxsize=2)  # the epoch at hand and, across its end, the next
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(size)


class _Steps(Dataset[Any]):
    """Windows by index, for a DataLoader."""

    def __init__(self, batches: Batches, start: int, stop: int) -> None:
        self.batches, self.start, self.stop = batches, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Window | LeadError:
        if index >= len(self):
            raise IndexError(index)
        try:
            return self.batches.window(self.start + index, due=True)
        except LeadError as error:  # returned: raised here, the DataLoader would wrap it in another type
            return error


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Leave the SIGCHLD handler as it is. PyTorch's own raises in whatever line the training is at when a worker dies; the
    loader notices by itself within seconds, in its own line, which can report what happened."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


def _one_thread(_: int) -> None:
    """Workers share the cores among themselves already."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
