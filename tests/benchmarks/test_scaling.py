"""The scaling model's limits, its agreement with lead_ds.plan, and that scaling.md shows what the model says."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.scaling_model import ELEMENT, PLACEMENTS, Hardware, Model, Work, break_even, forward, pipeline, step

TEACHER = Model("t", layers=3, width=4096, layer=200_000_000, embeddings=100_000_000, numel=700_000_000)
STUDENT = Model("s", layers=6, width=768, layer=7_000_000, embeddings=23_000_000, numel=66_000_000)
WORK = Work()
NO_LATENCY = Hardware(base_us=0, hop_us=0, network_hop_us=0)
PERFECT = replace(NO_LATENCY, nvlink_gbs=math.inf, network_gbps=math.inf, pcie_gbs=math.inf, nvme_gbs=math.inf)
SHARDED = PLACEMENTS[1:]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("nodes", [1, 8])
def test_infinite_bandwidth_exposes_nothing(placement: str, nodes: int) -> None:
    cost = step(PERFECT, WORK, TEACHER, STUDENT, placement, nodes, 2)
    assert cost.exposed == pytest.approx(0, abs=1e-12)
    assert cost.total == pytest.approx(cost.teacher_compute + cost.student_compute)


def test_one_gpu_has_no_network() -> None:
    alone = step(replace(Hardware(), gpus=1), WORK, TEACHER, STUDENT, "zero3", 1, 1)
    assert alone == step(replace(Hardware(), gpus=1), WORK, TEACHER, STUDENT, "replicate", 1, 1)
    assert alone.exposed == 0


def test_compute_does_not_depend_on_the_cluster_or_the_placement() -> None:
    costs = [step(Hardware(), WORK, TEACHER, STUDENT, p, n, 4) for p in PLACEMENTS for n in scaling.NODES]
    assert len({cost.teacher_compute for cost in costs}) == len({cost.student_compute for cost in costs}) == 1
    tokens = 4 * 32 * (32 + 8 * 128)
    assert costs[0].teacher_compute == pytest.approx(2 * 3 * 200e6 * tokens / 400e12)
    assert costs[0].student_compute == pytest.approx(6 * 6 * 7e6 * tokens / 120e12)


def test_replicate_gathers_nothing_and_hpz_never_leaves_the_node() -> None:
    slow = replace(Hardware(), network_gbps=1.0)
    assert forward(slow, TEACHER, [5000], "replicate", 64)[1] == 0
    assert forward(slow, TEACHER, [5000], "zero3+hpz", 64) == forward(slow, TEACHER, [5000], "zero3", 1)


@pytest.mark.parametrize("nodes", [2, 8, 64])
def test_break_even_is_flops_over_bandwidth_whatever_the_model(nodes: int) -> None:
    rule = NO_LATENCY.tflops * 1e12 / NO_LATENCY.network
    share = (8 * nodes - 1) / (8 * nodes)
    for layer in (1_000_000, 855_654_400):
        assert break_even(NO_LATENCY, replace(TEACHER, layer=layer), "zero3", nodes) == pytest.approx(rule * share)
    # 400 TFLOP/s over 50 GB/s, as often quoted: about 8 thousand.
    full = replace(NO_LATENCY, network_gbps=400.0, network_efficiency=1.0)
    assert break_even(full, TEACHER, "zero3", nodes) == pytest.approx(8000 * share)


@pytest.mark.parametrize("placement", SHARDED)
@pytest.mark.parametrize("nodes", [1, 4])
def test_beyond_break_even_only_the_start_is_exposed(placement: str, nodes: int) -> None:
    hardware = Hardware()
    need = break_even(hardware, TEACHER, placement, nodes)
    start = sum(hardware.fetch(ELEMENT * size, placement, nodes) for size in (TEACHER.embeddings, TEACHER.layer))
    assert forward(hardware, TEACHER, [math.ceil(need)], placement, nodes)[1] == pytest.approx(start)
    short = forward(hardware, TEACHER, [int(need / 2)], placement, nodes)[1]
    lacking = (TEACHER.layers - 1) * hardware.fetch(ELEMENT * TEACHER.layer, placement, nodes) / 2
    assert short == pytest.approx(start + lacking, rel=1e-3)


def test_pipeline_by_hand() -> None:
    # fetch 5, then max(1, 2), max(3, 7), and the last computation 4
    assert pipeline([(5, 1), (2, 3), (7, 4)]) == 5 + 2 + 7 + 4


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("field", ["network_gbps", "nvlink_gbs", "pcie_gbs", "nvme_gbs", "network_efficiency"])
def test_more_bandwidth_is_never_slower(placement: str, field: str) -> None:
    totals = [
        step(replace(Hardware(), **{field: value}), WORK, TEACHER, STUDENT, placement, 4, 1).total
        for value in (0.1, 1.0, 10.0, 100.0, 1000.0)
    ]
    assert totals == sorted(totals, reverse=True)


def test_more_nodes_are_never_faster_for_one_rank() -> None:
    for placement in ("replicate", "zero3", "zero3+hpz"):
        totals = [step(Hardware(), WORK, TEACHER, STUDENT, placement, nodes, 1).total for nodes in scaling.NODES]
        assert totals == sorted(totals)


def test_ring_by_hand() -> None:
    # Two nodes of 8: 15/16 of 1 GB over 0.9 x 400 Gb/s, 14 hops on NVLink and one over the network.
    assert Hardware().ring(1e9, 2) == pytest.approx(15 / 16 / 45 + (8.4 + 14 * 3.4 + 14.0) * 1e-6)
    assert Hardware().ring(1e9, 1) == pytest.approx(7 / 8 / 360 + (8.4 + 7 * 3.4) * 1e-6)


def test_memory_and_shapes_are_those_of_lead_ds_plan() -> None:
    teacher, student = scaling.models("7B", WORK)
    # Mistral-7B's 7,241,732,096 published parameters without the head of 32000 x 4096; DistilBERT's 66 M.
    assert teacher.numel == 7_241_732_096 - 32000 * 4096
    assert teacher.numel == teacher.layers * teacher.layer + teacher.embeddings + teacher.width
    assert student.numel == 66_362_880
    plan = scaling.memory("7B", WORK, 8, 2, 4, 80.0)
    parameters = scaling.requirements("7B", WORK).teachers[0].shape.parameters
    share = sum(-(-p.numel // 16) for p in parameters)
    second = sum(-(-p.numel // 8) for p in parameters)
    assert plan["replicate"].uses["teacher shard"] == ELEMENT * teacher.numel
    assert plan["zero3"].uses["teacher shard"] == ELEMENT * share
    assert plan["zero3+hpz"].uses["teacher shard"] == ELEMENT * (share + second)
    assert plan["zero3+cpu"].host == 8 * ELEMENT * share
    assert all(estimate.fits == (estimate.total <= 80e9) for estimate in plan.values())


def test_choice_prefers_shards_where_they_cost_nothing_and_skips_what_does_not_fit() -> None:
    def rows(times: dict[str, float], fits: set[str]) -> list[scaling.Row]:
        empty = step(PERFECT, WORK, None, STUDENT, "", 1, 1)
        blank = replace(empty, student_compute=0.0)
        return [
            scaling.Row(100, 1, "t", p, 1, replace(blank, teacher_compute=t), 0, p in fits) for p, t in times.items()
        ]

    everything = set(PLACEMENTS)
    assert scaling.choice(rows({"replicate": 1.0, "zero3": 1.04}, everything)) == "zero3"
    assert scaling.choice(rows({"replicate": 1.0, "zero3": 1.06, "zero3+hpz": 1.01}, everything)) == "zero3+hpz"
    assert (
        scaling.choice(rows({"replicate": 1.0, "zero3": 2.0, "zero3+cpu": 1.5}, {"zero3", "zero3+cpu"})) == "zero3+cpu"
    )
    assert scaling.choice(rows({"replicate": 1.0}, set())) == "nothing fits"


def test_the_page_shows_what_its_command_gives(tmp_path: Path) -> None:
    """Whoever changes the model, the plan or an assumption runs `python -m benchmarks.scaling --write`."""
    page = scaling.PAGE.read_text("utf-8")
    given = page.split(scaling.BEGIN)[1].split("`")[1]
    words = shlex.split(given)
    assert words[:3] == ["python", "-m", "benchmarks.scaling"]
    again, cells = tmp_path / "scaling.md", tmp_path / "cells.json"
    again.write_text(page.replace("### Models", "### something stale"))
    scaling.main([*words[3:], "--write", str(again), "--json", str(cells)])
    assert again.read_text("utf-8") == page
    made = json.loads(cells.read_text())
    assert {(c["teacher"], c["placement"], c["nodes"]) for c in made} == {
        (t, p, n) for t in ("7B", "13B", "70B") for p in PLACEMENTS for n in (1, 2, 4, 8, 16, 32, 64)
    }
    assert all(c["seconds"] == pytest.approx(sum(c["step"].values())) for c in made)


def test_every_assumption_is_an_option_and_named_on_the_page() -> None:
    options = vars(scaling.parse(["--tflops", "512", "--network-gbps", "3200"]))
    assert {**asdict(Hardware()), **asdict(WORK)}.keys() <= options.keys()
    assert scaling.command(scaling.parse(["--tflops", "512", "--network-gbps", "3200"])) == (
        "python -m benchmarks.scaling --tflops 512.0 --network-gbps 3200.0"
    )
    page = scaling.PAGE.read_text("utf-8")
    for name in asdict(Hardware()):
        assert f"`--{name.replace('_', '-')}`" in page


@pytest.mark.parametrize(
    "argv", [["--tflops", "0"], ["--network-gbps", "-1"], ["--accumulation", "0"], ["--tflops", "nan"]]
)
def test_impossible_numbers_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        scaling.parse(argv)
    assert done.value.code == 2
    assert f"argument {argv[0]}: must be positive" in capsys.readouterr().err
