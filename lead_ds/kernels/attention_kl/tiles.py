"""Tiles of the attention KL, by the shared memory that a block may have."""

from typing import NamedTuple

from lead_ds.kernels.dispatch import ADA, AMPERE, BLACKWELL, CDNA, HOPPER, tiles_for

# Wider heads leave no tile whose accumulators fit the registers.
MAX_WIDTH = 256


class Tiles(NamedTuple):
    """Query rows and keys of a tile, warps and pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


# By kernel ("both": dK with the atomic dQ), element size and the wider of the two head dimensions, up to the given one:
# the largest tiles that compile without spilling registers.
TABLE: dict[int, dict[tuple[str, int, int], Tiles]] = {
    CDNA: {
        ("forward", 2, 64): Tiles(64, 64, 4, 1),
        ("forward", 2, 128): Tiles(64, 32, 4, 1),
        ("forward", 2, 256): Tiles(32, 32, 4, 1),
        ("forward", 4, 64): Tiles(32, 32, 4, 1),
        ("forward", 4, 128): Tiles(16, 32, 4, 1),
        ("forward", 4, 256): Tiles(16, 16, 4, 1),
        ("dq", 2, 64): Tiles(64, 32, 4, 1),
        ("dq", 2, 128): Tiles(32, 32, 4, 1),
        ("dq", 2, 256): Tiles(32, 16, 4, 1),
        ("dq", 4, 64): Tiles(32, 32, 4, 1),
        ("dq", 4, 128): Tiles(16, 32, 4, 1),
        ("dq", 4, 256): Tiles(16, 16, 4, 1),
        ("dk", 2, 64): Tiles(32, 64, 4, 1),
        ("dk", 2, 128): Tiles(32, 32, 4, 1),
        ("dk", 2, 256): Tiles(16, 32, 4, 1),
        ("dk", 4, 64): Tiles(32, 32, 4, 1),
        ("dk", 4, 128): Tiles(32, 16, 4, 1),
        ("dk", 4, 256): Tiles(16, 16, 4, 1),
        ("both", 2, 64): Tiles(32, 32, 4, 1),
        ("both", 2, 128): Tiles(16, 32, 4, 1),
        ("both", 4, 64): Tiles(16, 32, 4, 1),
        ("both", 4, 128): Tiles(16, 16, 8, 1),
    },
    ADA: {
        ("forward", 2, 64): Tiles(64, 64, 4, 2),
        ("forward", 2, 128): Tiles(64, 32, 4, 2),
        ("forward", 2, 256): Tiles(32, 16, 8, 1),
        ("forward", 4, 64): Tiles(32, 32, 8, 1),
        ("forward", 4, 128): Tiles(16, 32, 8, 1),
        ("forward", 4, 256): Tiles(16, 16, 8, 1),
        ("dq", 2, 64): Tiles(64, 32, 4, 2),
        ("dq", 2, 128): Tiles(64, 32, 8, 2),
        ("dq", 2, 256): Tiles(32, 32, 8, 1),
        ("dq", 4, 64): Tiles(32, 32, 8, 1),
        ("dq", 4, 128): Tiles(16, 16, 8, 1),
        ("dq", 4, 256): Tiles(16, 16, 8, 1),
        ("dk", 2, 64): Tiles(32, 64, 8, 2),
        ("dk", 2, 128): Tiles(32, 64, 8, 1),
        ("dk", 2, 256): Tiles(16, 32, 8, 1),
        ("dk", 4, 64): Tiles(32, 16, 8, 1),
        ("dk", 4, 128): Tiles(32, 16, 8, 1),
        ("dk", 4, 256): Tiles(16, 16, 8, 1),
        ("both", 2, 64): Tiles(32, 64, 8, 2),
        ("both", 2, 128): Tiles(16, 64, 8, 2),
        ("both", 4, 64): Tiles(16, 16, 8, 1),
        ("both", 4, 128): Tiles(16, 32, 8, 1),
    },
}
TABLE[AMPERE] = TABLE[ADA] | {("dk", 2, 128): Tiles(32, 64, 8, 2), ("dk", 2, 256): Tiles(32, 32, 8, 1)}
TABLE[HOPPER] = TABLE[AMPERE] | {
    ("forward", 2, 64): Tiles(128, 128, 8, 2),
    ("forward", 2, 128): Tiles(128, 64, 8, 2),
    ("forward", 2, 256): Tiles(64, 32, 8, 1),
    ("dq", 2, 64): Tiles(64, 64, 4, 3),
    ("dq", 2, 128): Tiles(128, 64, 8, 2),
    ("dk", 2, 64): Tiles(64, 64, 8, 2),
    ("dk", 4, 256): Tiles(16, 16, 4, 1),
    ("both", 2, 64): Tiles(32, 128, 8, 2),
    ("both", 2, 128): Tiles(16, 128, 8, 2),
    ("both", 4, 64): Tiles(16, 32, 8, 1),
}
# Hopper's tiles would spill there; the second of these would on Hopper.
TABLE[BLACKWELL] = TABLE[HOPPER] | {("forward", 2, 64): Tiles(128, 64, 8, 2), ("dk", 2, 128): Tiles(64, 64, 8, 1)}
# Averaged heads: the forward, which holds both models' means, and the gradients, which hold them and one head's.
_MEAN: dict[int, dict[tuple[str, int, int], Tiles]] = {
    CDNA: {
        ("mean", 2, 64): Tiles(64, 32, 8, 1),
        ("mean", 2, 128): Tiles(64, 32, 8, 1),
        ("mean", 2, 256): Tiles(64, 32, 4, 1),
        ("mean", 4, 64): Tiles(32, 32, 8, 1),
        ("mean", 4, 128): Tiles(32, 32, 8, 1),
        ("mean", 4, 256): Tiles(32, 16, 8, 1),
        ("mean dq", 2, 64): Tiles(64, 32, 8, 1),
        ("mean dq", 2, 128): Tiles(64, 32, 4, 1),
        ("mean dq", 2, 256): Tiles(64, 32, 4, 1),
        ("mean dq", 4, 64): Tiles(32, 32, 8, 1),
        ("mean dq", 4, 128): Tiles(32, 16, 8, 1),
        ("mean dq", 4, 256): Tiles(32, 16, 8, 1),
        ("mean dk", 2, 64): Tiles(32, 64, 8, 1),
        ("mean dk", 2, 128): Tiles(32, 64, 4, 1),
        ("mean dk", 2, 256): Tiles(32, 32, 4, 1),
        ("mean dk", 4, 64): Tiles(16, 32, 8, 1),
        ("mean dk", 4, 128): Tiles(16, 32, 8, 1),
        ("mean dk", 4, 256): Tiles(16, 32, 8, 1),
    },
    ADA: {
        ("mean", 2, 64): Tiles(64, 64, 8, 2),
        ("mean", 2, 128): Tiles(64, 64, 8, 2),
        ("mean", 2, 256): Tiles(64, 32, 8, 2),
        ("mean", 4, 64): Tiles(32, 32, 8, 1),
        ("mean", 4, 128): Tiles(16, 16, 4, 1),
        ("mean", 4, 256): Tiles(16, 32, 8, 1),
        ("mean dq", 2, 64): Tiles(64, 64, 8, 2),
        ("mean dq", 2, 128): Tiles(64, 32, 8, 1),
        ("mean dq", 2, 256): Tiles(32, 32, 8, 1),
        ("mean dq", 4, 64): Tiles(32, 32, 8, 1),
        ("mean dq", 4, 128): Tiles(32, 32, 8, 1),
        ("mean dq", 4, 256): Tiles(16, 32, 8, 1),
        ("mean dk", 2, 64): Tiles(32, 64, 8, 2),
        ("mean dk", 2, 128): Tiles(32, 32, 8, 2),
        ("mean dk", 2, 256): Tiles(32, 16, 8, 1),
        ("mean dk", 4, 64): Tiles(32, 32, 8, 1),
        ("mean dk", 4, 128): Tiles(32, 32, 8, 1),
        ("mean dk", 4, 256): Tiles(32, 16, 8, 1),
    },
}
_MEAN[AMPERE] = _MEAN[ADA] | {
    ("mean", 2, 128): Tiles(64, 32, 8, 2),
    ("mean", 2, 256): Tiles(64, 32, 8, 1),
    ("mean", 4, 128): Tiles(16, 32, 8, 1),
    ("mean", 4, 256): Tiles(32, 32, 8, 1),
    ("mean dq", 2, 64): Tiles(64, 32, 8, 2),
    ("mean dq", 2, 128): Tiles(32, 32, 8, 2),
}
_MEAN[HOPPER] = _MEAN[ADA] | {
    ("mean", 4, 128): Tiles(32, 16, 8, 1),
    ("mean dq", 2, 128): Tiles(64, 32, 8, 2),
    ("mean dk", 2, 64): Tiles(64, 64, 8, 2),
    ("mean dk", 2, 128): Tiles(64, 32, 8, 2),
}
_MEAN[BLACKWELL] = _MEAN[ADA] | {
    ("mean", 2, 128): Tiles(64, 32, 8, 2),
    ("mean", 2, 256): Tiles(64, 32, 8, 1),
    ("mean", 4, 128): Tiles(32, 16, 8, 1),
    ("mean", 4, 256): Tiles(32, 32, 8, 1),
    ("mean dq", 2, 64): Tiles(64, 32, 8, 2),
    ("mean dk", 2, 128): Tiles(32, 64, 8, 1),
}
for _shared, _entries in _MEAN.items():
    TABLE[_shared] |= _entries


def listed(shared: int, kernel: str, size: int, width: int) -> Tiles:
    """The table's entry for a kernel, an element size and the wider of two head dimensions."""
    return tiles_for(TABLE, shared)[kernel, size, next(wide for wide in (64, 128, MAX_WIDTH) if width <= wide)]
