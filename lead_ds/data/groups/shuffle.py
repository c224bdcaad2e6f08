"""A permutation that is never held: the place of each item is computed, so that its number is no matter of memory."""

from __future__ import annotations

from lead_ds.data.groups.drawing import mix

ROUNDS = 4


def shuffled(place: int, count: int, *keys: int) -> int:
    """The item at `place` of a permutation of the integers below `count`, which depends on `keys` alone.

    A Feistel network over the next power of four, walked until it is below `count` (Black and Rogaway, Ciphers with
    Arbitrary Finite Domains, 2002).

    >>> sorted(shuffled(place, 10, 3) for place in range(10)) == list(range(10))
    True
    """
    half = max(1, (max(1, count - 1).bit_length() + 1) // 2)
    mask, key = (1 << half) - 1, 0
    for one in keys:
        key = mix(key ^ one)
    while True:
        left, right = place >> half, place & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (mix(mix(key + turn) ^ right) & mask)
        place = left << half | right
        if place < count:
            return place
