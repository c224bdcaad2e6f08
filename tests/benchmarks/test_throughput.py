"""The throughput benchmark: rows one can trust, baselines that compute what lead-ds computes, a suite that names every preset."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import first, throughput
from benchmarks.baselines import LeadLoop, Loop, PlainLoop
from benchmarks.kernels import specs
from benchmarks.throughput_inputs import Inputs, costs
from benchmarks.throughput_presets import MISTRAL_7B, PRESETS, QWEN3, Preset, bert
from benchmarks.throughput_runners import same_losses
from lead_ds.config import Config
from lead_ds.engine.distributed.ranks import Ranks, ranks
from lead_ds.models.load import load_text
from tests.helpers.launch import ROOT

SUITE = ROOT / "benchmarks" / "gpu_suite.sh"
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 1000}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
STUDENT = {"model_type": "distilbert", "vocab_size": 1000, "dim": 32, "n_heads": 2, "hidden_dim": 128, "n_layers": 3}
OVERRIDES = ["train.batch_size=3", "data.negatives=2", "losses.layer.k=2"]


def shrunk(name: str) -> Preset:
    """A preset with models of its architecture that take milliseconds."""
    shapes = {
        "bert": tuple(bert(n, 16 * n, n, vocab_size=1000, initializer_range=0.2) for n in (4, 2)),
        "7b": ({**MISTRAL_7B, **SMALL}, STUDENT),
        "reranker": ({**QWEN3, **SMALL, "head_dim": 16}, STUDENT),
    }
    return replace(PRESETS[name], teacher=shapes[name][0], student=shapes[name][1])


@pytest.fixture(scope="module")
def here() -> Any:
    """This process as the only one."""
    with ranks() as this:
        yield this


def made(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Config:
    """A shrunk preset's configuration, its files written."""
    monkeypatch.setitem(PRESETS, name, shrunk(name))
    options = throughput.arguments(["--preset", name])
    config = throughput.settings_of(options, folder, [*OVERRIDES, *overrides])
    throughput.write_files(PRESETS[name], config, folder, 1, PRESETS[name].lengths)
    return config


@pytest.mark.parametrize(
    ("name", "kind"), [("bert", LeadLoop), ("bert", PlainLoop), ("7b", PlainLoop), ("reranker", PlainLoop)]
)
def test_baselines_compute_the_losses_of_lead_ds(
    name: str, kind: type[Loop], here: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = made(name, tmp_path, monkeypatch, "seed=1")
    ours, theirs = same_losses(config, here, kind)
    assert ours.keys() == theirs.keys() == {"contrastive", "response", "layer"}
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert all(value > 1e-3 for value in ours.values())


def test_rows_and_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PRESETS, "tiny", replace(shrunk("bert"), steps=2, warmup=1))
    out = tmp_path / "rows.json"
    options = throughput.arguments(
        ["--preset", "tiny", "--out", str(out), "--compare", "train.accumulation=2 kernels=torch", *OVERRIDES]
    )
    throughput.run(options, here, tmp_path)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    fields = {"benchmark", "preset", "setting", "processes", "clock", "machine", "versions", "date"}
    assert all(fields | {"provider", "metric", "unit", "value"} <= row.keys() for row in rows)
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    assert settings == [" ".join(OVERRIDES), " ".join([*OVERRIDES, "train.accumulation=2", "kernels=torch"])]
    for setting in settings:
        value = {(row["provider"], row["metric"]): row["value"] for row in rows if row["setting"] == setting}
        assert {provider for provider, _ in value} == {"lead-ds", "bare", "LEAD's loop", "plain loop"}
        step = sum(x for (who, metric), x in value.items() if who == "lead-ds" and metric.startswith("part: "))
        bare = sum(value["bare", f"part: {part}"] for part in ("teacher forward", "student forward", "backward"))
        assert value["lead-ds", "overhead ratio"] == pytest.approx(step / bare)
        queries = 3 * (2 if "accumulation" in setting else 1)
        for who in ("lead-ds", "plain loop"):
            whole = sum(x for (name, metric), x in value.items() if name == who and metric.startswith("part: "))
            assert value[who, "queries per second"] == pytest.approx(1e3 * queries / whole)
            assert value[who, "passages per second"] == pytest.approx(3 * value[who, "queries per second"])
            assert value[who, "step p50"] <= value[who, "step p95"]
            assert value[who, "peak memory"] >= value[who, "memory held between steps"]
        assert value["lead-ds", "loss: layer"] == pytest.approx(value["LEAD's loop", "loss: layer"], rel=1e-4)
    assert "overhead ratio" in capsys.readouterr().out
    shares = [row for row in rows if row["metric"].endswith("MFU")]
    assert {row["metric"] for row in shares} == {"teacher MFU", "student MFU"}
    for row in shares:
        assert row["flops"] > 0
        assert row["value"] == throughput.mfu(row["flops"], row["peak_flops"])


def test_no_mfu_above_the_ceiling() -> None:
    assert throughput.mfu(3e9, 4e9) == 0.75
    assert throughput.mfu(4e9, 4e9) == 1
    assert throughput.mfu(5e9, 4e9) == "none: the ceiling is too low, give --flops"


def test_the_ceiling_of_bfloat16_is_no_lower_than_that_of_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A CPU without bf16 instructions computes such products in float32, or slowly.
    rates = {
        (torch.bfloat16, False): 1.0,
        (torch.bfloat16, True): 2.0,
        (torch.float32, False): 4.0,
        (torch.float32, True): 3.0,
    }
    monkeypatch.setattr(throughput, "_PEAKS", {})
    monkeypatch.setattr(throughput, "_product_rate", lambda device, dtype, turned: rates[dtype, turned])
    assert throughput.peak_flops(torch.device("cpu"), torch.bfloat16) == 4
    assert throughput.peak_flops(torch.device("cpu"), torch.float32) == 4


def test_memory_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: Ranks) -> None:
    monkeypatch.setitem(PRESETS, "tiny", shrunk("bert"))
    out = tmp_path / "rows.json"
    throughput.run(
        throughput.arguments(["--preset", "tiny", "--memory-steps", "5", "--out", str(out), *OVERRIDES]), here, tmp_path
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["step"] for row in rows if "step" in row] == [1, 2, 3, 4, 5]
    assert rows[-1]["value"] == pytest.approx(rows[-2]["value"] - rows[0]["value"])


def test_overhead_is_the_step_over_the_bare_parts() -> None:
    ours = [{"teacher forward": 4.0, "losses": 2.0}, {"teacher forward": 6.0}]
    bare = [{"waiting for data": 9.0, "teacher forward": 2.0, "student forward": 1.0, "backward": 1.0}]
    assert throughput.overhead(ours, bare) == 1.5


@pytest.mark.parametrize("lengths", ["full", "natural"])
def test_texts_have_the_lengths_they_claim(
    lengths: str, here: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "7b", replace(shrunk("7b"), lengths=lengths))
    options = throughput.arguments(["--preset", "7b"])
    config = throughput.settings_of(options, tmp_path, OVERRIDES)
    throughput.write_files(PRESETS["7b"], config, tmp_path, 1, lengths)
    for settings in (config.teacher, config.student):
        assert settings is not None
        encoder = load_text(settings)
        lines = (tmp_path / "data" / "corpus.jsonl").read_text().splitlines()
        mask = encoder.passages([json.loads(line)["text"] for line in lines])["attention_mask"]
        tokens = mask.sum(1).double()
        if lengths == "full":
            assert tokens.unique().tolist() == [settings.passage_length]
        else:
            assert tokens.mean().item() == pytest.approx(76, rel=0.05)
            assert tokens.max() <= settings.passage_length


def test_flop_are_those_that_torch_counts(here: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from lead_ds.models.backbone import load_model

    config = made("7b", tmp_path, monkeypatch, "student.attention=eager")  # the fused one is not counted on a CPU
    model = load_model(config.student, "base", torch.float32)
    (texts,) = Inputs(config, here).step(0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**texts.student_passages)
    tokens, flops = costs(model, [texts.student_passages])
    assert tokens == texts.student_passages["attention_mask"].sum()
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.05)  # biases and norms are parameters too


def test_the_suite_names_every_kernel_and_preset() -> None:
    for script in (SUITE, SUITE.with_name("gpus_suite.sh"), SUITE.with_name("suite.sh")):
        subprocess.run(["bash", "-n", str(script)], check=True)
    text = SUITE.read_text()
    presets = re.findall(r"^ *train (\d+) (\w+)", text, re.M)
    assert {name for _, name in presets} == set(PRESETS) - {"tiny"}
    (kernels,) = re.findall(r"for kernel in (.+); do", text)
    assert kernels.split() == [spec.name for spec in specs(None)]
    (first,), (each,) = (
        re.findall(r"^limit=(\d+)", text, re.M),
        re.findall(r"^limit.* kernel_seconds=(\d+)", text, re.M),
    )
    assert int(first) <= 60
    assert int(first) + len(kernels.split()) * int(each) + sum(int(seconds) for seconds, _ in presets) <= 8 * 60


def test_the_suite_says_what_is_missing(tmp_path: Path) -> None:
    for script in (SUITE, SUITE.with_name("gpus_suite.sh")):
        asked = subprocess.run([str(script)], capture_output=True, text=True)
        assert (asked.returncode, asked.stderr.startswith("usage")) == (2, True)
    if not torch.cuda.is_available():
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\necho "$PYTHONPATH" > {tmp_path}/path\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        environment = {**os.environ, "PYTHON": str(python), "PYTHONPATH": "/packages/of/mine"}
        done = subprocess.run([str(SUITE), str(tmp_path)], capture_output=True, text=True, env=environment)
        assert done.returncode == 1
        assert "fewer than 1 CUDA device" in done.stderr
        assert (tmp_path / "machine.txt").exists()
        assert (tmp_path / "path").read_text().split(":") == [str(ROOT), "/packages/of/mine\n"]


def test_rows_of_a_run_that_was_cut_off_are_there(tmp_path: Path, here: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: Any, **__: Any) -> Iterator[dict[str, Any]]:
        yield {"provider": "lead-ds", "metric": "queries per second", "unit": "1/s", "value": 1.0}
        raise KeyboardInterrupt

    monkeypatch.setattr(throughput, "measure", measured)
    options = throughput.arguments(["--preset", "tiny", "--providers", "lead-ds", "--out", str(tmp_path / "rows.json")])
    with pytest.raises(KeyboardInterrupt):
        throughput.run(options, here, tmp_path)
    (row,) = map(json.loads, (tmp_path / "rows.json").read_text().splitlines())
    assert row["metric"] == "queries per second"


def test_a_part_in_one_line() -> None:
    row = {"part": "maxsim bf16", "case": "d128", "right": True, "error": 0.01, "allowed": 0.1}
    row |= {"repeats": 9, "equal": 9, "seconds": 2.0}
    one = "maxsim bf16: right, 1 case(s), at most 0.10 of the allowed error, 9 repetitions equal, 2.0 s"
    assert first.told("maxsim bf16", [row]) == one
    raced = row | {"right": False, "equal": 7}
    assert "WRONG: d128: error 0.01 of 1e-01 allowed, 2 of 9 repetitions differ" in first.told(
        "maxsim bf16", [row, raced]
    )
    exact = [2.0, 1.9, 1.8]
    for losses, right in (([2.001, 1.9, 1.81], True), ([2.1, 1.9, 1.8], False), ([2.0, 2.0, 2.05], False)):
        assert first.check_losses("bf16", "bf16", losses, exact, 1.0)["right"] == right


@pytest.mark.slow
@pytest.mark.parametrize("script", [["gpu_suite.sh"], ["gpus_suite.sh", "2"]])
def test_the_suite_runs_dry(tmp_path: Path, script: list[str]) -> None:
    name, *more = script
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(SUITE.with_name(name)), str(tmp_path), *more, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = [line.split(" (")[0] for line in done.stdout.splitlines()]
    if name == "gpu_suite.sh":
        kernels = [f"kernel-{spec.name}" for spec in specs(None)]
        assert parts == ["first", *kernels, "bert", "7b", "reranker", "8b"]
    else:
        assert parts == ["resume", "gathers", "scaling-1", "scaling-2"]
    for part in parts:
        rows = [json.loads(line) for line in (tmp_path / f"{part}.json").read_text().splitlines()]
        assert rows, part
