"""Losses of others: found through an entry point, or named in the configuration."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lead_ds.config import Config
from lead_ds.errors import InputError
from lead_ds.losses import LOSSES, Loss, LossSettings, LossShape, ModelFacts, register
from lead_ds.losses.objective import Objective
from tests.helpers.launch import ROOT

LOSS = """
import torch
from lead_ds.losses import Loss, LossSettings, register

class Settings(LossSettings):
    margin: float = 0.5

@register
class Sprawl(Loss):
    name, Settings, needs = "NAME", Settings, frozenset()

    def forward(self, views):
        p_PD = views.student.final.p_KPD[-1]
        return (p_PD @ p_PD.T - self.settings.margin).relu().mean()
"""
USE = """
from lead_ds.config import losses_section
losses = losses_section()()
assert losses.sprawl.weight == 0 and losses.sprawl.margin == 0.5, losses
active = losses_section().model_validate({"sprawl": {"weight": 2, "margin": 0.1}}).active
assert set(active) == {"sprawl", "contrastive", "response", "layer"}, list(active)
try:
    losses_section().model_validate({"sprawl": {"margn": 0.1}})
except ValueError as error:
    assert "sprawl.margn" in str(error)
    print("refused")
"""
BASE = {"student": {"path": "-"}, "data": {"path": "-"}, "losses": {"response": {"weight": 0}, "layer": {"weight": 0}}}


def install(folder: Path, code: str) -> None:
    """A package as pip would leave it: a module, and the metadata that names its entry point."""
    (folder / "sprawl_loss.py").write_text(code)
    info = folder / "sprawl_loss-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sprawl-loss\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lead_ds.losses]\nsprawl = sprawl_loss:Sprawl\n")


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=folder)


def test_an_installed_package_adds_a_loss(tmp_path: Path) -> None:
    install(tmp_path, LOSS.replace("NAME", "sprawl"))
    done = run(USE, tmp_path)
    assert done.stdout == "refused\n", done.stderr


def test_a_broken_package_is_named(tmp_path: Path) -> None:
    install(tmp_path, "import a_module_that_is_not_there")
    done = run("from lead_ds.config import losses_section; losses_section()", tmp_path)
    assert "sprawl_loss:Sprawl): the package that adds sprawl cannot be imported: ModuleNotFoundError" in done.stderr


def test_a_file_that_the_configuration_names(tmp_path: Path) -> None:
    path = tmp_path / "named.py"
    path.write_text(LOSS.replace("NAME", "sprawl_of_file"))
    tree = {**BASE, "plugins": [str(path)]}
    try:
        config = Config.model_validate({**tree, "losses": {**BASE["losses"], "sprawl_of_file": {"weight": 0.5}}})
        again = Config.model_validate(config.model_dump(mode="json"))
        assert again == config
        assert not config.losses.needs_teacher
        facts = ModelFacts("dual_encoder", layers=3)
        assert set(Objective(config.losses, LossShape(facts))) == {"sprawl_of_file", "contrastive"}
    finally:
        LOSSES._parts.pop("sprawl_of_file", None)


def test_what_cannot_be_imported_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    for name, told in (
        ("no_such_module", "ModuleNotFoundError"),
        (str(tmp_path / "none.py"), "FileNotFoundError"),
        (str(broken), "ZeroDivisionError"),
    ):
        with pytest.raises(InputError, match=f"plugins: .* cannot be imported: {told}"):
            Config.model_validate({**BASE, "plugins": [name]})


def test_a_need_that_is_none_is_refused() -> None:
    class Wrong(Loss):
        name, Settings, needs = "wrong", LossSettings, frozenset({"vectors"})  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="no loss needs vectors"):
        register(Wrong)
