"""What a loss is: a module that makes a scalar of what it sees of a micro-batch, and the settings that stand beside it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_args, overload

from pydantic import TypeAdapter
from torch import Tensor, nn
from typing_extensions import Self

from lead_ds.errors import InputError
from lead_ds.losses.selection import NO_LAYERS, Depths, Layers
from lead_ds.losses.vectors import Moments
from lead_ds.losses.views import Views
from lead_ds.relevance import Impl
from lead_ds.settings.base import Section, Weight
from lead_ds.settings.registry import Registry
from lead_ds.settings.roles import Quantize

Need = Literal["labels", "final", "layers", "features", "attention"]
Output = Tensor | tuple[Tensor, dict[str, Tensor]]


class LossSettings(Section):
    """What every loss is set by. A loss's own settings are a subclass; weight 0 switches it off."""

    weight: Weight = 0.0


@dataclass(frozen=True)
class ModelFacts:
    """What a loss may know of a model before it sees a batch: its kind, its layers, the width of its vectors (None: scores).

    unit: its vectors have length 1.
    """

    kind: str
    layers: int
    width: int | None = None
    unit: bool = False


@dataclass(frozen=True)
class LossShape:
    """The models that a loss is made for. teacher: None without one. impl: of the kernels.

    dims: the widths that the student's vectors are trained at, ascending; none: as they are. quantize: the bits that they are
    trained to be held in.

    >>> LossShape(ModelFacts("dual_encoder", layers=3, width=384), ModelFacts("colbert", layers=12, width=128)).widths("mine")
    (384, 128)
    """

    student: ModelFacts
    teacher: ModelFacts | None = None
    impl: Impl = "auto"
    dims: Sequence[int] = ()
    quantize: Quantize | None = None

    def widths(self, loss: str) -> tuple[int, int]:
        """Of the student's and the teacher's vectors. Raises InputError naming the loss where one has none."""
        student, teacher = self.student.width, self.teacher.width if self.teacher else None
        if student is None or teacher is None:
            what = f"compares vectors, and the {'student' if student is None else 'teacher'} has none"
            raise InputError(f"losses.{loss}", what, "set its weight to 0, or name a model of vectors")
        return student, teacher


@dataclass(frozen=True)
class Chosen:
    """A loss that a run is to have, with values of its settings: `losses.Response(weight=3)`."""

    loss: type[Loss]
    values: dict[str, Any]


class _LossType(type):
    def __call__(cls, *made_for: Any, **values: Any) -> Any:
        """The module, of settings and a shape; or, of values of settings alone, the choice of it for a run."""
        return super().__call__(*made_for, **values) if made_for else Chosen(cls, values)  # type: ignore[arg-type]


class Loss(nn.Module, metaclass=_LossType):
    """A loss. Its weights, if any, are trained, sharded, checkpointed and resumed with the student's, but not saved with it.

    name: its section in `losses`. Settings: that section, a subclass of LossSettings or an annotated union of such.
    needs: what it reads, other than the student's own final features. "labels": which passage is the positive. "final":
    relevance of both models. "layers": that of selected layers. "features": vectors of both models, where scores will
    not do. "attention": taps of selected layers. All but labels need a teacher.
    row: where statistics of layers stand in metrics.jsonl; null: under its name.
    Called with values of its settings alone, a class is `Chosen` for a run, and made when the models are there.

    >>> import torch
    >>> class Spread(Loss):
    ...     name, Settings, needs = "spread", LossSettings, frozenset()
    ...     def forward(self, views):
    ...         p_PD = views.student.final.p_KPD[-1]
    ...         return (p_PD @ p_PD.T).square().mean()
    >>> from lead_ds.losses.views import Scope, Side
    >>> from lead_ds.relevance import VectorFeatures
    >>> student = Side(VectorFeatures(torch.eye(2)[None], torch.eye(2)[None]))
    >>> loss = Spread(LossSettings(weight=1), LossShape(ModelFacts("dual_encoder", layers=3, width=2)))
    >>> loss(Views(student, None, Scope(group_size=1))).item()
    0.5
    """

    name: ClassVar[str]
    Settings: ClassVar[Any]
    needs: frozenset[Need] = frozenset({"final"})
    row: ClassVar[str | None] = None

    @overload
    def __init__(self, settings: Any, shape: LossShape) -> None: ...
    @overload
    def __init__(self, **values: Any) -> None: ...  # for type checkers, which do not read a metaclass: see _LossType
    def __init__(self, settings: Any = None, shape: Any = None, **values: Any) -> None:
        super().__init__()
        self.settings, self.shape = settings, shape
        self.needs = self.reads(settings)

    @abstractmethod
    def forward(self, views: Views) -> Output:
        """A scalar with gradient, and, if it has more to report, detached statistics by name: scalars, or vectors of layers.

        A statistic of the loss's own name stands for the scalar where losses are reported.
        """

    def strength(self, step: int) -> float:
        """How much of its weight counts at a step, the first being 0; of it alone, so that a resumed run goes on as it was."""
        return 1.0

    @property
    def sample(self) -> int:
        """How many texts it is fitted on before the first step; 0: none."""
        return 0

    def fit(self, moments: Moments) -> None:
        """Begin from a sample of both models' vectors, equal on every process. What it keeps is in non-persistent buffers."""

    @classmethod
    def reads(cls, settings: Any) -> frozenset[Need]:
        """What a loss so set needs."""
        return cls.needs

    @classmethod
    def pair(cls, settings: Any, models: Depths, step: int) -> Layers:
        """The teacher's and the student's layers that a loss so set compares at a step, paired in order.

        Raises InputError where a layer does not exist.
        """
        selected = not cls.reads(settings).isdisjoint({"layers", "attention"})
        return settings.pair(f"losses.{cls.name}", models, step) if selected else NO_LAYERS

    @classmethod
    def deepest(cls, settings: Any, teacher_layers: int) -> int:
        """How many of a teacher's first layers decide a loss so set."""
        needs = cls.reads(settings)
        if not needs.isdisjoint({"final", "features"}):
            return teacher_layers
        return 0 if needs.isdisjoint({"layers", "attention"}) else settings.deepest(teacher_layers)

    @classmethod
    def set(cls, **values: Any) -> Any:
        """Checked settings. Raises ValueError (pydantic's) for values that cannot be.

        >>> from lead_ds.losses import LOSSES
        >>> LOSSES["layer"].set(select="last", k=3).k
        3
        """
        return TypeAdapter(cls.Settings).validate_python(values)


LOSSES: Registry[type[Loss]] = Registry("lead_ds.losses", "lead_ds.losses")
"""Every loss by its name in the configuration; another package adds one through an entry point of this group."""

L = TypeVar("L", bound=type[Loss])


def register(loss: L) -> L:
    """A decorator that adds a loss to `LOSSES` under its name. Raises ValueError where the name is another's."""
    unknown = set(loss.needs) - set(get_args(Need))
    if unknown:
        raise ValueError(f"{loss.name}: no loss needs {', '.join(unknown)}: use {', '.join(get_args(Need))}")
    return LOSSES.register(loss.name)(loss)


class Losses(Section):
    """The objective's settings: one section for each registered loss, composed by `lead_ds.config`."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    @property
    def active(self) -> dict[str, tuple[type[Loss], Any]]:
        """The losses with a weight, by name: each one's class and settings."""
        sections = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: (LOSSES[name], section) for name, section in sections.items() if section.weight > 0}

    @property
    def needs(self) -> frozenset[Need]:
        """What the losses with a weight need, together."""
        return frozenset(need for loss, section in self.active.values() for need in loss.reads(section))

    @property
    def needs_teacher(self) -> bool:
        """Whether any loss with a weight reads the teacher."""
        return bool(self.needs - {"labels"})

    def needing(self, *needs: Need) -> list[str]:
        """The names of the losses with a weight that need one of these."""
        return [name for name, (loss, section) in self.active.items() if not loss.reads(section).isdisjoint(needs)]

    def only(self, names: Collection[str]) -> Self:
        """These with a weight for the losses `names` alone."""
        off = {name: section.model_copy(update={"weight": 0.0}) for name, (_, section) in self.active.items()}
        return self.model_copy(update={name: section for name, section in off.items() if name not in names})

    def pairs(self, models: Depths, step: int) -> dict[str, Layers]:
        """The layers that each loss with a weight compares at a step, where it compares any. Raises as `Loss.pair`."""
        found = {name: loss.pair(section, models, step) for name, (loss, section) in self.active.items()}
        return {name: layers for name, layers in found.items() if layers[0]}

    def deepest(self, teacher_layers: int) -> int:
        """How many of a frozen teacher's first layers decide the losses; at least one."""
        return max([1, *(loss.deepest(section, teacher_layers) for loss, section in self.active.values())])

    def reach(self, teacher_layers: int) -> list[int]:
        """The teacher's layers whose relevance may be compared at one step or another. Raises as `Loss.pair`."""
        sections = {name: getattr(self, name) for name in self.needing("layers")}
        return sorted(
            {i for name, section in sections.items() for i in section.reach(f"losses.{name}", teacher_layers)}
        )

    @property
    def captured(self) -> int:
        """Pairs of layers whose relevance is compared at a step, at most."""
        return sum(getattr(self, name).count for name in self.needing("layers"))

    @property
    def kept(self) -> Any:
        """The settings of the loss with a weight whose map becomes the student's last layer, or None."""
        return next((section for _, section in self.active.values() if getattr(section, "keep", False)), None)

    @property
    def informative(self) -> Any:
        """The settings of the loss with a weight that draws from the teacher's informative layers, or None."""
        found = (section for _, section in self.active.values() if getattr(section, "select", None) == "informative")
        return next(found, None)
