"""Learning rate as a pure function of the step, so that a resumed run has nothing to restore."""

from __future__ import annotations

import math

from lead_ds.settings.train import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Multiplier of the base learning rate at `step` (0-based): linear warm-up, then linear or cosine decay to 0."""
    warmup = math.ceil(config.steps * config.warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, config.steps - warmup)
    return 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
