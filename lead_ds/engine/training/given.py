"""What a run is given as Python objects: the parts of it that no configuration file can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lead_ds.data.groups.group import Groups
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.engine.records.callbacks import Callback
from lead_ds.errors import InputError


@dataclass(frozen=True)
class Given:
    """groups: instead of those of the section `data`; callbacks: told of the run."""

    groups: Groups | None = None
    callbacks: Sequence[Callback] = ()


NOTHING = Given()


def check_given(groups: Groups, given: Given, ranks: Ranks) -> None:
    """Refuse ranks that were given different objects: they would train on different data, or wait for each other."""
    facts = ranks.all(
        {"data": groups.checksums, "callbacks": [type(callback).__name__ for callback in given.callbacks]}
    )
    for rank, other in enumerate(facts):
        for name in other:
            if other[name] != facts[0][name]:
                raise InputError(name, f"rank {rank} was given others than rank 0", "give every rank the same")
