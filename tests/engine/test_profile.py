"""`profile: true`: phases that add up to the step, communication laid bare, tables and a trace in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lead_ds.config import load_config
from lead_ds.engine.distributed.ranks import ranks
from lead_ds.engine.records import phases as phases_module
from lead_ds.engine.records.phases import PhaseClock, Phases, mean_phases
from lead_ds.engine.records.profile import exposed
from lead_ds.engine.training.distill import distill
from lead_ds.engine.training.resume import changed_keys
from lead_ds.errors import InputError
from lead_ds.report import write_report
from lead_ds.report.profile import profile_text
from tests.helpers.launch import launch


def test_a_clock_divides_a_step_without_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0, 21.0])
    monkeypatch.setattr(phases_module.time, "perf_counter", lambda: next(times))
    clock = PhaseClock(torch.device("cpu"))
    clock.at("waiting for data")  # 0
    clock.at("student forward")  # 1
    clock.at("losses")  # 3
    with clock.inside("communication"):  # 6, and the losses go on at 10
        pass
    clock.at("waiting for data")  # 15
    clock.end_step()
    clock.at("student forward")  # 21: of a step that has not ended
    assert clock.seconds() == [{"waiting for data": 1, "student forward": 2, "losses": 3 + 5, "communication": 4}]
    assert list(mean_phases(clock.seconds())) == ["waiting for data", "student forward", "communication", "losses"]


def test_nobody_listens_by_default() -> None:
    phases = Phases()
    with phases.inside("communication"):
        phases.at("losses")
    phases.end_step()
    phases.close()
    assert vars(phases) == {}


def test_exposed_communication() -> None:
    assert exposed([(0, 4), (6, 8)], [(3, 7)]) == 3 + 1
    assert exposed([(1, 2)], [(0, 5)]) == 0
    assert exposed([], [(0, 5)]) == 0


@pytest.mark.parametrize(("value", "steps"), [("true", 5), ("{steps: 2, skip: 1}", 2), ("false", None)])
def test_profile_is_a_switch_or_a_section(configure: Callable[..., Path], value: str, steps: int | None) -> None:
    config = load_config(configure(), [f"profile={value}"])
    assert (config.profile.steps if config.profile else None) == steps
    assert changed_keys(load_config(configure()), config) == []  # a resumed run may be profiled, or not any more


def test_a_mistake_in_profile_is_told(configure: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"step.*did you mean 'steps'"):
        load_config(configure(), ["profile.step=2"])


def test_a_profiled_run_and_one_too_short_for_a_trace(
    configure: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(configure(profile={"skip": 1, "steps": 2}))
    short = load_config(configure("short", profile={"skip": 3, "steps": 3}))  # six steps in all
    with ranks():
        distill(config)
        told = capsys.readouterr().err
        distill(short, quiet=True)
    folder = Path(config.output) / "profile"
    profile = json.loads((folder / "profile.json").read_text())
    assert (profile["first_step"], profile["steps"], profile["processes"]) == (2, 2, 1)
    named = {row["part"]: row["ms"] for row in profile["parts"]}
    assert {"teacher forward", "student forward", "losses", "backward", "optimizer"} <= named.keys()
    assert sum(named.values()) == pytest.approx(profile["step_ms"]["p50"])  # of two steps, the median is the mean
    assert all(row["ms"] > 0 and row["calls"] > 0 for row in profile["operators"])
    trace = json.loads((folder / "trace-rank0.json").read_text())
    ranges = {event.get("name") for event in trace["traceEvents"]}
    assert {"lead-ds: teacher forward", "lead-ds: backward", "aten::addmm"} <= ranges
    text = (folder / "profile.txt").read_text()
    assert text == profile_text(profile)
    assert text in told
    assert "teacher forward" in write_report(config.output).read_text()

    folder = Path(short.output) / "profile"
    profile = json.loads((folder / "profile.json").read_text())
    assert (profile["steps"], profile["operators"]) == (3, [])
    assert not (folder / "trace-rank0.json").exists()


def test_two_ranks(configure: Callable[..., Path]) -> None:
    path = configure(profile={"skip": 1, "steps": 2}, train={"batch_size": 2})
    losses = launch("tests.engine.jobs:distil_each", 2, configs=[str(path)])
    assert len(losses[0][0]) == 6
    profile = json.loads((Path(load_config(path).output) / "profile" / "profile.json").read_text())
    named = {row["part"]: row for row in profile["parts"]}
    assert named["communication"]["ms"] > 0
    assert {row["slowest_rank"] for row in profile["parts"]} <= {0, 1}
    assert 0 <= profile["exposed_communication_ms"] <= profile["traced_step_ms"]
    assert "slowest rank" in profile_text(profile)
