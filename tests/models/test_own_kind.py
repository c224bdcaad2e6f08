"""A kind of model that lies in another package: installed, it is a student of the command line like any other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.helpers.launch import ROOT
from tests.helpers.tiny import tiny_dataset
from tests.models.tiny_models import tiny_model, tokens_of


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's package in a folder of its own."""
    target, source = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("source") / "own_kind"
    shutil.copytree(ROOT / "examples" / "own_kind", source)  # a build leaves files beside what it builds
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True)
    return target


def test_a_run_distils_a_student_of_a_kind_from_another_package(installed: Path, tmp_path: Path) -> None:
    tiny_dataset(tmp_path / "data")
    tree = {
        "teacher": {"path": tiny_model(tmp_path / "teacher", "bert", seed=1), "kind": "max_encoder", "dtype": "fp32"},
        "student": {"path": tiny_model(tmp_path / "student", "bert", layers=2), "kind": "max_encoder", "dtype": "fp32"},
        "data": {"path": str(tmp_path / "data"), "negatives": 2},
        "losses": {"layer": {"k": 1}},
        "train": {"steps": 2, "batch_size": 2, "evaluate_every": 0},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    paths = os.pathsep.join([str(installed), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lead_ds", "distill", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]

    from sentence_transformers import SentenceTransformer

    saved = SentenceTransformer(str(tmp_path / "run" / "student"), device="cpu")
    assert saved[1].pooling_mode == "max"
    with torch.no_grad():
        assert saved(tokens_of((4, 6)))["sentence_embedding"].shape == (2, 32)
