"""What a student learns from, whatever it is: a frozen model, a cache of one's output, scores of the training file.

Dimensions: A micro-batches of B queries, N passages of each, T layers of the teacher, K selected ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from lead_ds.data.groups.group import Groups
from lead_ds.data.reads import ModelBatch, Reads
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.models.scorer import Output
from lead_ds.relevance import Features
from lead_ds.settings.base import Section
from lead_ds.settings.data import DataConfig
from lead_ds.settings.registry import Registry
from lead_ds.settings.run import Run
from lead_ds.settings.train import TrainConfig

Gift = Literal["final", "layers", "features", "attention"]
"""What a loss may read of a teacher: relevance of its final state, of its layers; vectors or token states; attention maps."""


class TeacherSettings(Section):
    """Settings of a teacher that is not one of our models."""

    kind: str


@dataclass(frozen=True)
class TeacherView:
    """What the teacher gives for a window: final (K = 1) and selected layers' features; taps of each batch where
    requested."""

    final: Features
    layers: Features | None = None
    outputs: list[Output] = field(default_factory=list)


@dataclass(frozen=True)
class Lesson:
    """What a teacher is opened for: its own settings, the losses that it feeds, and sections of the run that it may read."""

    teacher: Any  # the teacher's own Settings
    losses: Any
    data: DataConfig
    train: TrainConfig
    seed: int
    lens_folder: Path  # where the teacher's tuned lens is, or will be
    deepspeed: str | dict[str, Any]  # of a sharded teacher
    attention: str | None = None  # the backend that an earlier part of the run measured to be the fastest

    @classmethod
    def of(cls, run: Run, key: str = "teacher", attention: str | None = None) -> Lesson:
        """The lesson of one of a run's teachers, at its dotted key."""
        settings = run.taught[key]
        named = getattr(settings, "lens_path", None)
        return cls(
            teacher=settings,
            losses=run.losses_of(key),
            data=run.data,
            train=run.train,
            seed=run.seed,
            lens_folder=run.lens_folder if named is None else Path(named),
            deepspeed=run.deepspeed.teacher,
            attention=attention,
        )


class Teacher(ABC):
    """Answers accumulation windows without gradient. Registered under the name that `teacher.kind` has.

    Opened step by step, so that what is wrong with the input is reported before any model is loaded. `settled`
    completes the settings, `drawn` the groups, `reads` decides what the teacher is given of them, `open` makes it
    ready. Every process calls each of them.
    """

    Settings: ClassVar[type[Section]]  # of a model: its role's and kind's; else a subclass of TeacherSettings
    gives: ClassVar[frozenset[Gift]]  # the most that a teacher of the kind can give
    reads_alone: ClassVar[bool] = False  # gives vectors of texts alone
    computes: ClassVar[bool] = False  # runs a model, which takes memory and may be begun a window early

    num_layers: int  # T
    placement: str
    lens_facts: dict[str, Any] | None = None  # of the tuned lens that its layers are read through

    @classmethod
    def settled(cls, settings: Any) -> Any:
        """The settings, with what the teacher's files say of them filled in. Raises InputError where they contradict."""
        return settings

    @classmethod
    def given(cls, settings: Any) -> frozenset[Gift]:
        """What a teacher so set gives: of `gives`, as far as it can be known before it is opened."""
        return cls.gives

    @classmethod
    def files(cls, settings: Any) -> dict[str, Path]:
        """The files that decide what it gives, by name: of a run that is resumed they must be what they were."""
        return {}

    @classmethod
    def address(cls, settings: Any) -> str | None:
        """Where a model is asked that is not here: at another address may be another one."""
        return None

    @classmethod
    def drawn(cls, groups: Groups) -> Groups:
        """The groups, as they are drawn for it. Raises InputError for groups of which it can say nothing."""
        return groups

    @classmethod
    @abstractmethod
    def reads(cls, lesson: Lesson, groups: Groups, ranks: Ranks) -> Reads:
        """What it is given of groups. Raises InputError for what is wrong with its files, or with groups for it."""

    @classmethod
    @abstractmethod
    def open(cls, lesson: Lesson, reads: Reads, sample: Callable[[], list[ModelBatch]], ranks: Ranks) -> Teacher:
        """The teacher, ready. sample: makes the batches of a run's first window."""

    @property
    def readable(self) -> list[int]:
        """The layers that can be requested, ascending."""
        return list(range(self.num_layers))

    @abstractmethod
    def window(
        self, chunks: Sequence[ModelBatch], layers: Sequence[int], tap_layers: Sequence[int] = ()
    ) -> TeacherView:
        """Features of a window's batches, joined. Every rank must call this with equally many batches."""

    @abstractmethod
    def describe(self) -> str:
        """A line for the start of a run."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What run.json records of it."""


TEACHERS: Registry[type[Teacher]] = Registry("lead_ds.teachers", "lead_ds.teachers")
"""Every teacher that is no model of this run, by its kind; another package adds one through an entry point of this group."""
