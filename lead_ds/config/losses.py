"""The section `losses`: one section for each registered loss, composed when it is read, so that a plugin's are among them."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any, get_args

from pydantic import Field, PlainValidator, SerializeAsAny, create_model
from pydantic.fields import FieldInfo

from lead_ds.losses import LOSSES, Loss, Losses, Need


class LossesConfig(Losses):
    """The objective: a weighted sum; weight 0 switches a loss off."""

    @classmethod
    def known_fields(cls) -> dict[str, FieldInfo]:
        return losses_section().model_fields


def losses_section() -> type[LossesConfig]:
    """The section with every loss that is registered now.

    >>> losses_section()().contrastive.weight
    1.0
    """
    depth = {need: place for place, need in enumerate(get_args(Need))}
    losses = [(name, LOSSES[name]) for name in LOSSES]
    # From labels to attention: the order in which losses are summed and reported.
    return _composed(tuple(sorted(losses, key=lambda item: max((depth[need] for need in item[1].needs), default=0))))


@lru_cache(maxsize=1)
def _composed(losses: tuple[tuple[str, type[Loss]], ...]) -> type[LossesConfig]:
    fields: dict[str, Any] = {name: (loss.Settings, Field(default_factory=loss.set)) for name, loss in losses}
    return create_model(
        "LossesConfig", __base__=LossesConfig, __module__=__name__, __doc__=LossesConfig.__doc__, **fields
    )


def _read(value: Any) -> LossesConfig:
    return value if isinstance(value, LossesConfig) else losses_section().model_validate(value)


AnyLosses = Annotated[SerializeAsAny[LossesConfig], PlainValidator(_read)]
"""The annotation of the field `losses`."""
