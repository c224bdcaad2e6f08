"""From groups to what the models read: one window per optimizer step and rank, tokenised ahead of the training loop.

Dimensions: W ranks, A micro-batches per step, B groups per micro-batch and rank, N passages per group, M known positives.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lead_ds.data.groups.by_id import IdGroups
from lead_ds.data.groups.group import Group, Groups
from lead_ds.data.taught.relevance import TeacherCache
from lead_ds.data.tokens.alignment import UNGROUPED, token_groups
from lead_ds.data.tokens.cache import TokenCache
from lead_ds.data.tokens.encoder import TextEncoder, Tokens
from lead_ds.data.tokens.passes import Cuts, Passes, even, in_passes, least_padding, packed
from lead_ds.errors import InputError, LeadError, RunError
from lead_ds.io.notes import say_once

if TYPE_CHECKING:
    from lead_ds.config import Config

_AHEAD = 2  # windows that are ready before they are asked for, per worker
_PAIRS = ("cross_encoder", "llm_reranker")


@dataclass
class ModelBatch:
    """What one model reads of some consecutive groups; query i's passages are rows i*N to i*N + N-1, the positive first."""

    group: int  # N
    queries: Tokens | None = None
    passages: Tokens | None = None
    pairs: Tokens | None = None  # instead of both, for models that read a query with a passage
    cached: Tokens | None = None  # instead of all, what a cached teacher said: see TeacherCache.read
    passes: Passes | None = None  # the rows of queries, then of passages, or of pairs: as the model is to run them

    @property
    def tables(self) -> list[Tokens]:
        """The texts of queries and of passages, or of pairs."""
        return [tokens for tokens in (self.queries, self.passages, self.pairs) if tokens is not None]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> ModelBatch:
        """The same on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ModelBatch:
        """The same in page-locked memory, from which copies to a GPU do not wait."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> ModelBatch:
        parts = {name: getattr(self, name) for name in ("queries", "passages", "pairs", "cached")}
        changed = {
            name: None if tokens is None else {key: change(tensor) for key, tensor in tokens.items()}
            for name, tokens in parts.items()
        }
        return ModelBatch(self.group, **changed, passes=None if self.passes is None else self.passes.map(change))


@dataclass
class Window:
    """One optimizer step of one rank: A micro-batches of B groups."""

    step: int
    epoch: int
    group: int  # N
    query_ids: list[str]
    passage_ids: list[str]
    student: list[ModelBatch]  # one per micro-batch
    teacher: list[
        ModelBatch
    ]  # chunks of whole groups, equally many on every rank (cached: one); none without a teacher
    passage_keys: Tensor  # int64 [A*B*N]; equal keys are the same passage
    positive_keys: Tensor  # int64 [A*B, M]; each query's known positives, padded with -1
    scores: Tensor | None  # float32 [A*B, N]; the groups' own teacher scores, NaN where absent

    def pin_memory(self) -> Window:
        """The same with all tensors in page-locked memory."""
        return replace(
            self,
            student=[batch.pin_memory() for batch in self.student],
            teacher=[batch.pin_memory() for batch in self.teacher],
            passage_keys=self.passage_keys.pin_memory(),
            positive_keys=self.positive_keys.pin_memory(),
            scores=None if self.scores is None else self.scores.pin_memory(),
        )


class Batches:
    """The windows of a run. Stateless: window s depends on the seed and s, not on what was read before.

    Each epoch is a permutation of the groups; step s takes its next W*A*B (an incomplete rest is dropped). Within a step,
    micro-batch a of rank r holds groups a*W*B + r*B and the next B-1, so that one process with batch W*B sees the
    micro-batches that W processes with batch B see.
    """

    def __init__(
        self,
        groups: Groups,
        student: TextEncoder,
        teacher: TextEncoder | TeacherCache | None,
        config: Config,
        *,
        rank: int,
        world: int,
    ) -> None:
        """Raises InputError when the groups are fewer than one step takes, or when their tokens cannot be kept."""
        self.groups, self.student, self.teacher = groups, student, teacher
        self.rank, self.world, self.seed = rank, world, config.seed
        self.batch_size, self.accumulation = config.train.batch_size, config.train.accumulation
        self.group = 1 + config.data.negatives
        self.workers = config.data.workers
        # Attention maps of differently tokenised texts are compared by the words that both models see.
        self.align = (
            isinstance(teacher, TextEncoder)
            and config.losses.attention.weight > 0
            and not {student.kind, teacher.kind} & set(_PAIRS)
            and not student.reads_like(teacher)
        )
        self._passes = config.student.passes, config.teacher.passes if config.teacher else None
        # A frozen teacher keeps no activations: GradCache has nothing to save there.
        cotrained = config.teacher is not None and config.teacher.train
        self._grad_cache = config.train.grad_cache, config.train.grad_cache if cotrained else None
        texts = config.teacher.batch_size if config.teacher else None
        window = self.batch_size * self.accumulation
        self.chunk = window if texts is None else max(1, min(window, texts // self.group))
        step = world * window
        self.steps_per_epoch = len(groups) // step
        if self.steps_per_epoch == 0:
            parts = f"{world} * {self.accumulation} * {self.batch_size} = {step}"
            raise InputError(
                groups.path,
                f"has {len(groups)} groups, a step takes processes * accumulation * batch_size = {parts}",
                "lower train.batch_size, train.accumulation or the number of processes",
            )

        if groups.identical and rank == 0:
            what = (
                f"{groups.identical} of {len(groups)} groups: a passage that is the query itself is no negative of it"
            )
            say_once(f"{groups.path.name}: {what} (data.keep_identical=true keeps it)")
        self._tokens: dict[int, TokenCache] = {}
        self._draw: Callable[[int, int, int], Group] = groups.draw
        if config.data.token_cache:
            self._keep_tokens(config.data.token_cache)

    def _keep_tokens(self, place: bool | str) -> None:
        """Read tokens instead of texts, of every model for which that is the same."""
        encoders = {i: x for i, x in enumerate((self.student, self.teacher)) if isinstance(x, TextEncoder)}
        for model, encoder in encoders.items():
            cache = TokenCache.open(place, self.groups, encoder, rank=self.rank)
            if cache is not None:
                self._tokens[model] = cache
        if len(self._tokens) == len(encoders) and not self.align and isinstance(self.groups, IdGroups):
            self._draw = partial(self.groups.draw, texts=False)

    def __iter__(self) -> Iterator[Window]:
        """The first epoch."""
        return self.windows(0, self.steps_per_epoch)

    def rows(self, step: int) -> np.ndarray:
        """The groups of this rank's window of a step, micro-batch after micro-batch. int64 [A*B]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        taken = self.world * self.accumulation * self.batch_size
        everyone = _permutation(self.seed, epoch, len(self.groups))[position * taken : (position + 1) * taken]
        return everyone.reshape(self.accumulation, self.world, self.batch_size)[:, self.rank].reshape(-1)

    def window(self, step: int) -> Window:
        """Draw and tokenise one window."""
        epoch = step // self.steps_per_epoch
        rows = self.rows(step)
        groups = [self._draw(int(row), self.seed, epoch) for row in rows]
        width = max(len(group.positive_keys) for group in groups)
        positive_keys = np.full((len(groups), width), -1, np.int64)
        for row, group in enumerate(groups):
            positive_keys[row, : len(group.positive_keys)] = group.positive_keys
        scores = [group.scores for group in groups if group.scores is not None]
        student = [self._read(self.student, part, 0) for part in _parts(groups, self.batch_size)]
        teacher = []
        if isinstance(self.teacher, TeacherCache):
            said = self.teacher.read(rows, [group.keys for group in groups])
            teacher = [ModelBatch(self.group, cached={name: torch.from_numpy(x) for name, x in said.items()})]
        elif self.teacher is not None:
            teacher = [self._read(self.teacher, part, 1) for part in _parts(groups, self.chunk)]
        if self.align and isinstance(self.teacher, TextEncoder):
            for part, batches in zip(_parts(groups, self.batch_size), zip(teacher, student, strict=True), strict=True):
                _align((self.teacher, self.student), batches, part)
        return Window(
            step=step,
            epoch=epoch,
            group=self.group,
            query_ids=[group.query_id for group in groups],
            passage_ids=[name for group in groups for name in group.passage_ids],
            student=student,
            teacher=teacher,
            passage_keys=torch.from_numpy(np.concatenate([group.keys for group in groups])),
            positive_keys=torch.from_numpy(positive_keys),
            scores=torch.from_numpy(np.stack(scores)) if scores else None,
        )

    def _read(self, encoder: TextEncoder, groups: Sequence[Group], model: int) -> ModelBatch:
        """What the student (0) or the teacher (1) reads of some groups, in the passes that the configuration asks for."""
        tokens, queries = self._tokens.get(model), self._grad_cache[model]
        batch = read(encoder, groups) if tokens is None else ModelBatch(self.group, **tokens.read(groups))
        if queries is not None:
            return split(batch, encoder, -(-len(groups) // queries), even)
        passes = self._passes[model]
        if passes == "packed":
            return pack(batch, encoder)
        return batch if passes is None else split(batch, encoder, passes, least_padding)

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
                    window = self.window(step)
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
            # The loader itself tells of a dead worker, or a read from its closed pipe fails; what a living worker raised
            # comes as "Caught ... in DataLoader worker process".
            if str(error).startswith("Caught "):
                raise
            what = f"a data-loader worker died: {(str(error) or type(error).__name__).splitlines()[0]}"
            remedy = "it may lack memory: lower data.workers, or set data.workers: 0"
            raise RunError("data.workers", what, remedy) from error
        finally:
            # Not left to the collector: a traceback keeps the iterator alive, perhaps into a later fork that breaks on it.
            items._shutdown_workers()  # type: ignore[attr-defined]


def read(encoder: TextEncoder, groups: Sequence[Group]) -> ModelBatch:
    """What a model of the encoder's kind reads of some groups."""
    queries = [group.query for group in groups]
    passages = [passage for group in groups for passage in group.passages]
    size = len(passages) // len(queries)
    if encoder.kind in _PAIRS:
        return ModelBatch(size, pairs=encoder.pairs([query for query in queries for _ in range(size)], passages))
    return ModelBatch(size, queries=encoder.queries(queries), passages=encoder.passages(passages))


def split(batch: ModelBatch, encoder: TextEncoder, n: int, cuts: Cuts) -> ModelBatch:
    """The batch with its rows in n passes."""
    return replace(batch, passes=in_passes(batch.tables, n, cuts, encoder.tokenizer.pad_token_id))


def pack(batch: ModelBatch, encoder: TextEncoder) -> ModelBatch:
    """The batch with its rows in one packed pass."""
    return replace(batch, passes=packed(batch.tables, encoder.tokenizer.pad_token_id))


def _align(
    encoders: tuple[TextEncoder, TextEncoder], batches: tuple[ModelBatch, ModelBatch], groups: Sequence[Group]
) -> None:
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


def _parts(groups: Sequence[Group], size: int) -> Iterator[Sequence[Group]]:
    for first in range(0, len(groups), size):
        yield groups[first : first + size]


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
            return self.batches.window(self.start + index)
        except LeadError as error:  # returned: raised here, the DataLoader would wrap it in another type
            return error


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Leave the SIGCHLD handler as it is. PyTorch's own raises in whatever line the training is at when a worker dies; the
    loader notices by itself within seconds, in its own line, which can tell what happened."""
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
