"""What a script of a researcher does under a launcher, on each of its processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lead_ds import Callback, Distiller
from lead_ds.engine.distributed.ranks import launched_rank
from lead_ds.errors import LeadError
from tests.face.conftest import ROWS
from tests.face.own_models import Words


class Stop(Callback):
    """Ends the run at a step."""

    def on_step(self, metrics: dict[str, Any]) -> bool:
        return metrics["step"] == 1


def script(rooms: str, out: str) -> dict[str, Any]:
    """Two runs one after the other, what each gave, and runs that processes disagree about."""
    rank, data = launched_rank(), Path(rooms)
    settings: dict[str, Any] = {
        "teacher": {"path": data / "cross", "kind": "cross_encoder", "dtype": "fp32", "max_length": 64},
        "student": data / "student",
        "losses": {"contrastive": {}, "response": {}, "layer": {"k": 2}},
        "steps": 3,
        "batch_size": 2,
        "negatives": 2,
        "lr": 1e-3,
        "log_every": 1,
        "kernels": "torch",
        "monitor": {"tensorboard": False, "csv": False},
    }
    found: dict[str, Any] = {}
    for name, callbacks in (("first", []), ("second", [Stop()])):
        run = Distiller(data=ROWS, output=f"{out}/{name}", callbacks=callbacks, **settings).train(quiet=True)
        found[name] = {
            "losses": [row["loss"] for row in run.metrics if "loss" in row],
            "vector": run.student.encode(["a text"])[0].tolist(),
            "evaluation": run.evaluate(data / "data", "dev"),
            "saved": str(run.save(f"{out}/saved-{name}")),
        }
    own = {"student": Words(), "deepspeed": {"student": "ds_configs/student_zero3.json"}}
    run = Distiller(data=ROWS, output=f"{out}/own", **{**settings, **own}).train(quiet=True)
    found["own"] = {
        "losses": [row["loss"] for row in run.metrics if "loss" in row],
        "vector": run.student.encode(["a text"])[0].tolist(),
    }
    others = [*ROWS[:-1], {**ROWS[-1], "query": f"asked by {rank}"}]
    for name, change in (("rows", {"data": others}), ("callbacks", {"callbacks": [Stop()] * (1 + rank)})):
        try:
            Distiller(**{"data": ROWS, **settings, **change}, output=f"{out}/{name}").train(quiet=True)
        except LeadError as error:
            found[name] = str(error)
    return found
