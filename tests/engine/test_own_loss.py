"""examples/own_loss.py on two processes: its weights are trained and sharded; a run that is killed resumes bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from lead_ds.losses import LOSSES
from tests.engine.jobs import losses_of
from tests.engine.running import Run
from tests.helpers.launch import ROOT, launch

EXAMPLE = ROOT / "examples" / "own_loss.py"
WEIGHT = "losses.projected.map.weight"
JOB = "tests.engine.jobs:distil_each"
STEPS = 12


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """The example registers its loss where its configuration is read, in this process too."""
    yield
    LOSSES._parts.pop("projected", None)


def files_of(run: Path, step: int) -> dict[str, Any]:
    """What DeepSpeed wrote of a step, by file: weights, their float32 copies and the optimizer's moments."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {path.name: torch.load(path, weights_only=False) for path in sorted(folder.glob("*_states.pt"))}


def tensors(tree: Any, at: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield at, tree
    elif isinstance(tree, (dict, list, tuple)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from tensors(value, f"{at}.{key}")


@pytest.mark.parametrize("stage", [1, 3])
def test_killed_and_resumed(stage: int, configure: Callable[..., Path], tmp_path: Path) -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 40
    sections: dict[str, Any] = {
        "plugins": [str(EXAMPLE)],
        "student": {"path": "dropout"},
        "losses": {"projected": {"weight": 1.0}},
        "train": {"steps": STEPS, "batch_size": 2, "save_every": 2, "keep": STEPS, "lr": 0.01},
        "deepspeed": {"student": f"ds_configs/student_zero{stage}.json"},
    }
    whole, killed = configure("whole", **sections), configure("killed", **sections)
    [losses, _] = launch(JOB, 2, configs=[str(whole)])
    assert len(losses[0]) == STEPS, losses[0]

    run = Run(killed)
    try:
        run.until_step(random.randint(3, STEPS - 2))
        random.choice(run.ranks()).kill()
        assert run.gone() != 0
    finally:
        run.kill()
    [resumed, _] = launch(JOB, 2, configs=[str(killed)], resume=True)
    assert resumed == losses
    assert losses_of(tmp_path / "killed") == losses[0]

    first, expected, found = (
        files_of(tmp_path / "whole", 2),
        files_of(tmp_path / "whole", STEPS),
        files_of(tmp_path / "killed", STEPS),
    )
    before, after, again = (dict(tensors(files)) for files in (first, expected, found))
    assert after.keys() == again.keys()
    assert all(torch.equal(after[name], again[name]) for name in after)

    [model] = [tree for name, tree in expected.items() if name.endswith("mp_rank_00_model_states.pt")][:1]
    shapes = [group[WEIGHT] for group in model["param_shapes"] if WEIGHT in group]
    assert [tuple(shape) for shape in shapes] == [(32, 16)]
    if stage == 1:
        name = next(name for name in after if name.endswith(f".module.{WEIGHT}"))
        assert not torch.equal(before[name], after[name]), "the loss's weights were not trained"
    with safe_open(tmp_path / "killed" / "student" / "model.safetensors", "pt") as saved:
        assert not any("projected" in name or "losses" in name for name in saved.keys())  # noqa: SIM118
