"""Tiles of MaxSim, by the shared memory that a block may have."""

from typing import NamedTuple

from lead_ds.kernels.dispatch import ADA, AMPERE, CDNA, HOPPER


class ForwardTiles(NamedTuple):
    """Query rows, passage tokens and width of a tile (width 0: the whole width stays resident), warps and stages."""

    rows: int
    tokens: int
    width: int
    warps: int
    stages: int


class ScatterTiles(NamedTuple):
    """Passage tokens, query rows and width of a tile of the passage-gradient product, warps and stages."""

    tokens: int
    rows: int
    width: int
    warps: int
    stages: int


# By element size and by what the kernel does. With a resident query tile ("whole width") two programs share a
# multiprocessor, so that one's maxima hide behind the other's products; that takes at most 128 registers a thread, which
# searching for the winner keeps only with half as many tokens a tile.
FORWARD: dict[int, dict[tuple[int, str], ForwardTiles]] = {
    CDNA: {
        (2, "whole"): ForwardTiles(128, 64, 0, 4, 1),
        (2, "whole, argmax"): ForwardTiles(128, 64, 0, 4, 1),
        (2, "sliced"): ForwardTiles(128, 64, 32, 4, 2),
        (2, "sliced, argmax"): ForwardTiles(128, 64, 32, 4, 2),
        (4, "sliced"): ForwardTiles(64, 64, 32, 4, 1),
        (4, "sliced, argmax"): ForwardTiles(64, 64, 32, 4, 1),
    },
    ADA: {
        (2, "whole"): ForwardTiles(128, 64, 0, 4, 2),
        (2, "whole, argmax"): ForwardTiles(128, 64, 0, 8, 2),
        (2, "sliced"): ForwardTiles(128, 128, 32, 8, 3),
        (2, "sliced, argmax"): ForwardTiles(128, 64, 32, 8, 3),
        (4, "sliced"): ForwardTiles(64, 64, 32, 8, 2),
        (4, "sliced, argmax"): ForwardTiles(64, 64, 32, 8, 2),
    },
    HOPPER: {
        (2, "whole"): ForwardTiles(128, 128, 0, 8, 2),
        (2, "whole, argmax"): ForwardTiles(128, 64, 0, 8, 3),
        (2, "sliced"): ForwardTiles(128, 128, 64, 8, 4),
        (2, "sliced, argmax"): ForwardTiles(128, 128, 64, 8, 4),
        (4, "sliced"): ForwardTiles(64, 64, 32, 8, 2),
        (4, "sliced, argmax"): ForwardTiles(64, 64, 32, 8, 2),
    },
}
FORWARD[AMPERE] = FORWARD[ADA] | {(2, "whole"): ForwardTiles(128, 64, 0, 4, 3)}
# Ampere takes Ada's.
SCATTER: dict[int, dict[int, ScatterTiles]] = {
    CDNA: {2: ScatterTiles(64, 32, 128, 4, 2), 4: ScatterTiles(64, 32, 64, 4, 1)},
    ADA: {2: ScatterTiles(128, 32, 128, 8, 3), 4: ScatterTiles(64, 32, 64, 8, 2)},
    HOPPER: {2: ScatterTiles(128, 64, 128, 8, 3), 4: ScatterTiles(64, 32, 64, 8, 2)},
}
