"""The learning rate is a pure function of the step."""

from __future__ import annotations

import pytest

from lead_ds.engine.training.schedule import learning_rate
from lead_ds.settings.train import TrainConfig


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 0.5, 2 / 6, 1 / 6]),
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]),
    ],
)
def test_warmup_then_decay(schedule: str, expected: list[float]) -> None:
    config = TrainConfig(steps=10, warmup_ratio=0.4, schedule=schedule)  # type: ignore[arg-type]
    assert [learning_rate(step, config) for step in range(10)] == pytest.approx(expected)


def test_no_warmup_starts_at_the_top() -> None:
    assert learning_rate(0, TrainConfig(steps=10, warmup_ratio=0.0)) == 1.0
