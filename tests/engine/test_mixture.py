"""A run on a mixture: each set is evaluated, and a run that goes on goes on where it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from lead_ds.config import load_config
from lead_ds.engine.distributed.agreement import facts
from lead_ds.engine.training.distill import distill
from lead_ds.errors import InputError
from tests.engine.jobs import losses_of
from tests.engine.running import copy_run
from tests.helpers.rooms import settings


def test_each_set_is_evaluated_and_a_run_resumes(rooms: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(rooms / "data", other)
    lines = (other / "train.jsonl").read_text().splitlines()
    (other / "train.jsonl").write_text("\n".join(lines[: len(lines) // 3]))
    train = {"steps": 4, "batch_size": 4, "save_every": 2, "evaluate_every": 0}
    split = next(path.stem for path in sorted((other / "qrels").glob("*.tsv")))
    tree = settings(rooms, tmp_path / "run", train=train, evaluation={"split": split, "measures": ["nDCG@10"]})
    sets = [{"path": str(rooms / "data")}, {"path": str(other), "weight": 2.0, "prompts": {"query": "say: "}}]
    tree["data"] = {"sets": sets, "negatives": 2, "batches": "apart", "alpha": 0.5}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    distill(load_config(path), quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    [measured] = [row["evaluation"] for row in rows if "evaluation" in row]
    assert set(measured) == {"nDCG@10", "data/nDCG@10", "other/nDCG@10"}
    assert measured["nDCG@10"] == pytest.approx((measured["data/nDCG@10"] + measured["other/nDCG@10"]) / 2)
    half = copy_run(path, "resumed", step=2)
    with pytest.raises(InputError, match="was written by micro-batches of 4 groups of one set"):
        distill(load_config(half, ["train.batch_size=2", "train.accumulation=2"]), resume=True, quiet=True)
    distill(load_config(half), resume=True, quiet=True)
    assert losses_of(tmp_path / "resumed") == losses_of(tmp_path / "run")
    assert {"data: corpus.jsonl", "other: data.train"} <= facts(load_config(path)).keys()
