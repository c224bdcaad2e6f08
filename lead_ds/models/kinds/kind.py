"""What every kind of model declares, once, in its own file: nothing outside of `lead_ds/models/kinds` names a kind."""

from __future__ import annotations

from typing import ClassVar, Literal

from lead_ds.models.scorer import Scorer
from lead_ds.settings.model import ModelConfig
from lead_ds.settings.registry import Registry

KINDS: Registry[type[Kind]] = Registry("lead_ds.kinds", "lead_ds.models.kinds")
"""Every kind by its name in the configuration; another package adds one through an entry point of this group."""


class Kind(Scorer):
    """A kind of model: a class of scorers, with what the rest of the house may ask of it.

    Register it under its name: `@KINDS.register("my_kind")`.
    """

    Settings: ClassVar[type[ModelConfig]]  # its section; `kind` is a Literal of its name

    reads_pairs: ClassVar[bool] = (
        False  # a query and a passage as one text: relevance within a query's own passages only
    )
    gives_vectors: ClassVar[bool] = False  # one vector per text: encode, index and exact search work
    lens_form: ClassVar[Literal["scores", "vectors"] | None] = (
        None  # of a tuned lens; None: no one state per text to read
    )
    can_be_student: ClassVar[bool] = True
    can_be_trained: ClassVar[bool] = True  # False: a frozen teacher only
