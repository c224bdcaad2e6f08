"""Random draws that depend on (seed, epoch, row) alone: the same on every rank, worker, platform and library version."""

from __future__ import annotations

from collections.abc import Iterator

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014) over 64-bit integers."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


class Draw:
    """A stream of random integers, seeded by a few numbers."""

    def __init__(self, *keys: int) -> None:
        self._state = 0
        for key in keys:
            self._state = mix(self._state ^ (key & _MASK))

    def below(self, n: int) -> int:
        """An integer in [0, n). The bias of the remainder is below n / 2**64."""
        self._state = (self._state + _GOLDEN) & _MASK
        return mix(self._state) % n

    def shuffled(self, n: int) -> Iterator[int]:
        """The integers below n in random order, each computed when it is needed (Fisher and Yates)."""
        moved: dict[int, int] = {}
        for i in range(n):
            j = i + self.below(n - i)
            yield moved.get(j, j)
            moved[j] = moved.get(i, i)
