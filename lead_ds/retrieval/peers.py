"""The processes that encode or evaluate together, as far as this room needs them."""

from __future__ import annotations

from typing import Protocol, TypeVar

T = TypeVar("T")


class Peers(Protocol):
    """This process among `world` of them: the engine's `Ranks`, or `ALONE`."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    def barrier(self) -> None:
        """Wait for every process."""

    def from_main(self, value: T) -> T:
        """Process 0's value, on every process."""

    def all(self, value: T) -> list[T]:
        """Every process's value, in order of rank, on every process."""


class _Alone:
    rank, world = 0, 1

    def barrier(self) -> None:
        return None

    def from_main(self, value: T) -> T:
        return value

    def all(self, value: T) -> list[T]:
        return [value]


ALONE: Peers = _Alone()


def share(count: int, peers: Peers) -> range:
    """The consecutive items of `count` that fall to this process; shares differ by one item at most."""
    return range(count * peers.rank // peers.world, count * (peers.rank + 1) // peers.world)


def largest_share(count: int, peers: Peers) -> int:
    """How many items the process with most of them has."""
    return -(-count // peers.world)
