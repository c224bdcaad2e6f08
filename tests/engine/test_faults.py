"""What can go wrong with a run on several processes: it ends soon and says why, nothing that was complete is lost, and
--resume gives the losses of the run that nothing happened to, bit for bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from lead_ds.engine.records.checkpoint import MANIFEST, checksum, damage, write_json
from tests.engine.jobs import losses_of
from tests.engine.running import Run, copy_run, steps_of
from tests.helpers.launch import launch
from tests.helpers.rooms import settings

JOB = "tests.engine.fault_jobs:run_each"
START, STEPS = 4, 16  # where the harmed runs begin, and their length
SECRET = "a-token-that-nobody-may-see"


class House:
    """The run that nothing happens to, and copies of it, as it was at step START, for each fault."""

    def __init__(self, folder: Path, rooms: Path) -> None:
        self.config = folder / "whole.yaml"
        tree = settings(
            rooms,
            folder / "whole",
            extra_teacher={"placement": "zero3"},
            student={"path": "dropout"},
            train={"steps": STEPS, "batch_size": 2, "save_every": 2, "keep": 50},
        )
        self.config.write_text(yaml.safe_dump(tree))
        self.folder = folder
        self.harmed: list[Path] = []
        [self.losses] = launch(JOB, 2, configs=[str(self.config)])[0]

    def copy(self, name: str, **sections: Any) -> Path:
        path = copy_run(self.config, name, step=START, **sections)
        self.harmed.append(path)
        return path


@pytest.fixture(scope="module")
def house(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("house"), rooms)


def checkpoints(config: Path) -> list[Path]:
    """A run's checkpoints, every one of which must be whole."""
    folder = Path(yaml.safe_load(config.read_text())["output"]) / "checkpoints"
    found = sorted(folder.glob("step-*[0-9]"))
    assert [damage(path) for path in found] == [None] * len(found)
    return found


def test_a_rank_killed_at_any_moment(house: House) -> None:
    config = house.copy("killed")
    run = Run(config, "--resume", SOME_TOKEN=SECRET)
    step = random.randint(START + 1, STEPS - 4)
    run.until_step(step)
    time.sleep(random.uniform(0, 0.3))
    rank = random.randrange(2)
    run.ranks()[rank].kill()
    assert run.gone() != 0, f"rank {rank}, step {step}"
    assert len(checkpoints(config)) >= 2


def test_a_rank_killed_while_a_checkpoint_is_written(house: House) -> None:
    config = house.copy("saving", train={"save_every": 1})
    run = Run(config, "--resume")
    run.until(lambda: len(run.ranks()) == 2, "ranks")
    victim = random.choice(run.ranks())
    folder = run.output / "checkpoints"
    run.until(lambda: any(name.endswith(".partial") for name in os.listdir(folder)), "checkpoint", nap=0.0005)
    victim.kill()
    assert run.gone() != 0
    assert len(checkpoints(config)) >= 2


def test_sigterm_to_the_job_finishes_the_step_and_saves(house: House) -> None:
    config = house.copy("terminated", train={"save_every": 1000})
    run = Run(config, "--resume", script=True)
    run.until_step(START + 2)
    run.process.send_signal(signal.SIGTERM)
    assert run.gone() == 143, run.told
    *_, last = checkpoints(config)
    step = steps_of(run.output)
    assert last.name == f"step-{step:08d}", "the checkpoint is of the last step that was done"
    assert START < step < STEPS
    assert f"step {step}: stopped by SIGTERM, with a checkpoint (continue with --resume)" in run.told


def test_sigint_to_one_rank_stops_all_at_the_same_step(house: House) -> None:
    config = house.copy("interrupted", train={"save_every": 1000})
    run = Run(config, "--resume")
    run.until_step(START + 2)
    run.ranks()[1].send_signal(signal.SIGINT)
    assert run.gone() == 130, run.told
    *_, last = checkpoints(config)
    assert last.name == f"step-{steps_of(run.output):08d}"
    assert "stopped by SIGINT" in run.told


def test_a_rank_that_hangs_is_named(house: House) -> None:
    # Longer than loading takes on a busy machine, which stands still for as long.
    config = house.copy("hung", train={"watchdog_minutes": 1.0})
    run = Run(config, "--resume", script=True)
    run.until_step(START + 2)
    [_, victim] = run.ranks()
    victim.send_signal(signal.SIGSTOP)
    assert run.gone() == 1, run.told
    assert "watchdog: no progress for" in run.told
    assert f"rank 1 (process {victim.pid} on " in run.told
    assert "does not answer, last seen in " in run.told
    assert "rank 0 (process" in run.told
    assert (run.output / "watchdog-rank-0.txt").read_text().startswith(("Thread", "Current thread"))
    checkpoints(config)


def test_a_data_loader_worker_that_dies(house: House) -> None:
    config = house.copy("worker", data={"workers": 1})
    run = Run(config, "--resume")
    run.until_step(START + 1)
    workers = [child for rank in run.ranks() for child in rank.children()]
    assert workers
    random.choice(workers).kill()
    assert run.gone() == 1
    assert "data.workers: a data-loader worker died" in run.told
    checkpoints(config)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of its own, with few bytes or few files."""
    mounted = []

    def mount(limit: str) -> Path:
        folder = tmp_path / f"disk-{limit.replace('=', '-')}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", limit, "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    try:
        yield mount
    finally:
        for folder in mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(
    ("limit", "told"),
    [
        # The free bytes suffice, then there is no room for another file: what fails is a write in the middle, of the
        # rank that comes last.
        ("size=100m,nr_inodes=21", "_states.pt: "),
        pytest.param("size=1500k", "no space left: a checkpoint takes", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_is_full(house: House, small_disk: Callable[[str], Path], limit: str, told: str) -> None:
    disk = small_disk(limit)
    config = house.copy("full", output=str(disk / "run"))
    house.harmed.remove(config)
    run = Run(config, "--resume")
    assert run.gone() == 1, run.told
    assert "could not be saved: rank" in run.told
    assert told in run.told
    assert "earlier checkpoints are intact: make room and continue with --resume" in run.told
    assert len(checkpoints(config)) >= 2
    assert not list(disk.glob("run/checkpoints/*.partial")), "half a checkpoint takes no room"
    assert not (disk / "run" / "student").exists()
    subprocess.run(["mount", "-o", "remount,size=100m,nr_inodes=1000", str(disk)], check=True)
    [continued] = launch(JOB, 2, configs=[], resume=[str(config)])[0]
    assert continued == house.losses


@pytest.mark.parametrize("harm", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(house: House, harm: str) -> None:
    # Continued, with what the other tests left, in the last test.
    config = house.copy(harm)
    folder = Path(yaml.safe_load(config.read_text())["output"]) / "checkpoints" / f"step-{START:08d}"
    file = random.choice(list(folder.glob("*.pt")))
    content = bytearray(file.read_bytes())
    if harm == "flipped":
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    file.write_bytes(content[:-1] if harm == "truncated" else content)
    assert damage(folder) == f"{file.name} changed"


def weights(output: Path) -> bytes:
    return (output / "student" / "model.safetensors").read_bytes()


def test_every_harmed_run_continues_as_if_nothing_had_happened(house: House) -> None:
    assert house.harmed, "runs after the tests above"
    told = launch(JOB, 2, configs=[], resume=[str(config) for config in house.harmed])[0]
    for config, losses in zip(house.harmed, told, strict=True):
        assert losses == house.losses, config.stem
        assert weights(config.with_suffix("")) == weights(house.config.with_suffix("")), config.stem
        assert not list((config.with_suffix("") / "checkpoints").glob("*.partial"))


def test_nothing_written_is_open_to_others_or_holds_the_environment(house: House) -> None:
    files = list(house.folder.rglob("*"))
    assert len(files) > 100
    for file in files:
        if file.is_relative_to(house.folder / "whole"):
            assert file.stat().st_mode & 0o022 == 0, file
        if file.is_file():
            assert SECRET.encode() not in file.read_bytes(), file


def test_ranks_that_were_started_differently_are_refused(house: House, rooms: Path, tmp_path: Path) -> None:
    def config(name: str, **sections: Any) -> str:
        path = tmp_path / f"{name}.yaml"
        tree = settings(rooms, tmp_path / "run", train={"batch_size": 2, **sections.pop("train", {})}, **sections)
        path.write_text(yaml.safe_dump(tree))
        return str(path)

    shutil.copytree(rooms / "data", tmp_path / "data")
    with (tmp_path / "data" / "corpus.jsonl").open("a") as file:
        file.write("\n")
    shutil.copytree(rooms / "student", tmp_path / "student")
    content = bytearray((tmp_path / "student" / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "student" / "model.safetensors").write_bytes(content)
    plain = config("plain")
    cases = [
        [plain, config("lr", train={"lr": 2e-3})],
        [plain, config("data", data={"path": str(tmp_path / "data")})],
        [plain, config("model", student={"path": str(tmp_path / "student")})],
        [plain, config("zero", deepspeed={"student": "ds_configs/student_zero2.json"})],
        [plain, config("missing", data={"path": str(tmp_path)})],
    ]
    first, second = launch("tests.engine.fault_jobs:run_apart", 2, cases=cases)
    assert first == second
    for (status, told), key in zip(
        first,
        ["train.lr: ", "corpus.jsonl: ", "student: model.safetensors: ", "deepspeed.student.zero_", "corpus.jsonl: "],
        strict=True,
    ):
        assert status == 2
        assert told.startswith(key)
        assert "rank 1 on " in told
    assert "has 0.002, rank 0 on" in first[0][1]
    assert not (tmp_path / "run").exists(), "nothing was written"


class Code:
    """What runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_a_checkpoint_that_holds_code_is_not_read(house: House, tmp_path: Path) -> None:
    """Even where its checksums are right: whoever can write one file there can write the other."""
    for world, name in ((1, "code1"), (2, "code2")):  # read as it is, and converted
        config = house.copy(name, train={"batch_size": 4 // world})
        house.harmed.remove(config)
        folder = config.with_suffix("") / "checkpoints" / f"step-{START:08d}"
        for file in folder.glob("*.pt"):
            state = torch.load(file, weights_only=False)
            torch.save({**state, "more": Code(tmp_path / "ran")}, file)
        files = {path.name: checksum(path) for path in folder.iterdir() if path.name != MANIFEST}
        write_json(folder / MANIFEST, files)
        assert damage(folder) is None
        for status, told in launch(JOB, world, configs=[], resume=[str(config)])[0]:
            assert status == 1
            assert "more than tensors" in told or "weights_only" in told.lower() or "WeightsUnpickler" in told, told
        assert not (tmp_path / "ran").exists()


def test_uneven_shares(configure: Callable[..., Path], rooms: Path) -> None:
    """Epochs that end within a step, a teacher's chunks that do not divide a window, a dev set of odd size."""
    lines = (rooms / "data" / "train.jsonl").read_text().splitlines()
    odd = rooms / "data" / "odd.jsonl"
    odd.write_text("\n".join(lines[:13]) + "\n")
    train = {"steps": 9, "evaluate_every": 4}
    evaluation = {"split": "dev", "queries": 7, "batch_size": 3, "measures": ["nDCG@10"]}
    one, two = (
        configure(
            f"uneven{world}",
            extra_teacher={"placement": "zero3", "batch_size": 9},
            data={"train": "odd.jsonl"},
            train={**train, "batch_size": 4 // world},
            evaluation=evaluation,
        )
        for world in (1, 2)
    )
    [alone] = launch("tests.engine.fault_jobs:evaluations", 1, configs=[str(one)])
    both = launch("tests.engine.fault_jobs:evaluations", 2, configs=[str(two)])
    assert both[0] == both[1]
    assert len(alone[0]) == 3
    for mine, theirs in zip(alone[0], both[0][0], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-6)
    assert losses_of(one.with_suffix("")) == pytest.approx(losses_of(two.with_suffix("")), rel=1e-5)


def test_an_evaluation_that_a_signal_prevented_is_made_up_for(configure: Callable[..., Path]) -> None:
    sections: dict[str, Any] = {
        "train": {"steps": 12, "evaluate_every": 1, "save_every": 4},
        "evaluation": {"split": "dev", "measures": ["nDCG@10"]},
        "extra_teacher": {"placement": "replicate"},
    }
    whole, stopped = configure("evaluated", **sections), configure("stopped", **sections)
    job = "tests.engine.fault_jobs:stop_and_resume"
    [[ended, rows, resumed]] = launch(job, 1, whole=str(whole), stopped=str(stopped), step=5)
    assert ended[0] == 143, ended
    assert "stopped by SIGTERM" in ended[1]
    assert len(rows) == 24
    assert resumed == rows


def test_a_run_killed_before_it_wrote_which_checkpoint_is_best_keeps_that_one(configure: Callable[..., Path]) -> None:
    # At so small a rate every evaluation gives the same, so that the first stays the best.
    train = {"steps": 4, "batch_size": 2, "lr": 1e-12, "save_every": 1, "evaluate_every": 2, "keep": 1}
    config = configure("best", train=train, evaluation={"split": "dev", "measures": ["nDCG@10"]})
    [left] = launch("tests.engine.fault_jobs:killed_before_its_best_is_written", 1, config=str(config))
    assert left == ["best.json", "step-00000002", "step-00000004"]


def test_no_process_is_left() -> None:
    left = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a zombie among them
            left += [child.cmdline()] if "lead_ds" in child.cmdline() else []
    assert left == []
