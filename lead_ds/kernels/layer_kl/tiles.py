"""Tiles of the layer-relevance KL, by the shared memory that a block may have."""

from typing import NamedTuple

from lead_ds.kernels.dispatch import ADA, CDNA, HOPPER


class ScoreTiles(NamedTuple):
    """Queries, passages and width of a tile of scores, warps and stages."""

    queries: int
    passages: int
    width: int
    warps: int
    stages: int


# By element size and amount of work: small batches want many short programs; large ones hold both models' score tiles in
# registers, beside which a tile of the mask, or the addresses at which scores are stored, does not fit ("crowded").
# Ampere, between Ada and Hopper, takes Ada's.
SCORES: dict[int, dict[tuple[int, str], ScoreTiles]] = {
    CDNA: {
        (2, "small"): ScoreTiles(64, 32, 64, 4, 2),
        (2, "large"): ScoreTiles(64, 64, 32, 4, 2),
        (2, "large, crowded"): ScoreTiles(64, 64, 32, 4, 2),
        (4, "small"): ScoreTiles(32, 32, 32, 4, 2),
        (4, "large"): ScoreTiles(64, 64, 32, 4, 1),
        (4, "large, crowded"): ScoreTiles(32, 32, 32, 4, 2),
    },
    ADA: {
        (2, "small"): ScoreTiles(32, 32, 64, 4, 3),
        (2, "large"): ScoreTiles(128, 64, 32, 8, 3),
        (2, "large, crowded"): ScoreTiles(64, 64, 32, 8, 3),
        (4, "small"): ScoreTiles(32, 32, 32, 4, 2),
        (4, "large"): ScoreTiles(64, 64, 32, 8, 2),
        (4, "large, crowded"): ScoreTiles(32, 32, 32, 4, 2),
    },
    HOPPER: {
        (2, "small"): ScoreTiles(64, 32, 128, 4, 4),
        (2, "large"): ScoreTiles(128, 128, 64, 8, 4),
        (2, "large, crowded"): ScoreTiles(128, 64, 64, 8, 4),
        (4, "small"): ScoreTiles(32, 32, 32, 4, 2),
        (4, "large"): ScoreTiles(64, 64, 32, 8, 2),
        (4, "large, crowded"): ScoreTiles(32, 32, 32, 4, 2),
    },
}
# Tiles of the one-launch backward pass, by element size.
GRADIENT: dict[int, dict[int, ScoreTiles]] = {
    CDNA: {2: ScoreTiles(64, 32, 64, 4, 1), 4: ScoreTiles(32, 32, 64, 4, 1)},
    ADA: {2: ScoreTiles(64, 64, 64, 8, 2), 4: ScoreTiles(32, 32, 64, 4, 2)},
    HOPPER: {2: ScoreTiles(64, 64, 128, 4, 2), 4: ScoreTiles(32, 32, 64, 4, 2)},
}
