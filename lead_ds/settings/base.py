"""What every section of the configuration is made of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo


def _expanded(value: str) -> str:
    return os.path.expanduser(value) if value.startswith("~") else value


Place = Annotated[str, AfterValidator(_expanded)]  # a file, a folder or a name; ~ is the home folder

Meaning = Literal["place", "pace", "bits", "result"]


@dataclass(frozen=True)
class Means:
    """What a setting means for what a run computes, written at its field; an unmarked field decides the result.

    place: where something is; its content counts, not its name. pace: how fast, in whose memory, how often reported: the
    same numbers, bit for bit. bits: the same mathematics in another order of operations. result: other numbers.
    shared: a place that all processes write to together, and so must name alike.
    """

    meaning: Meaning
    shared: bool = False


PLACE, PACE, BITS = Means("place"), Means("pace"), Means("bits")

Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every generator takes, also times steps and ranks
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Temperature = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def each_once(what: str) -> AfterValidator:
    """A list that may not name one of its items twice; what: an item, in the error."""

    def check(items: list[Any]) -> list[Any]:
        if len(set(items)) < len(items):
            raise ValueError(f"names {what} twice")
        return items

    return AfterValidator(check)


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of, and those of its literals."""
    parts = get_args(annotation)
    found = {annotation} if not parts else set[Any]().union(*map(_kinds, parts))
    return found | {type(part) for part in parts if isinstance(part, bool)}


class Section(BaseModel):
    """A section of the configuration: unknown keys are errors, values are checked and then frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    instead: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Settings of its siblings that it ignores: what to do instead, where there is more to say than to take it out."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """True is 1 to Python; to whoever wrote it, it is a slip."""
        if isinstance(value, bool):
            kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
            if {int, float} & kinds and bool not in kinds:
                raise ValueError(f"{str(value).lower()} is no number")
        return value

    @classmethod
    def known_fields(cls) -> dict[str, FieldInfo]:
        """The settings of a section, by name; of one that is composed when it is read, those that it would have now."""
        return cls.model_fields
