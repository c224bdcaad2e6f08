"""What libraries would say in their own words, or not at all, is found at the start and told in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

from lead_ds.cli.main import main
from lead_ds.config import Config, load_config
from lead_ds.data.batches import Batches
from lead_ds.data.collections.texts import Texts
from lead_ds.data.groups.open import open_groups
from lead_ds.data.reads import Reads
from lead_ds.doctor.locks import batons
from lead_ds.engine.distributed import ranks
from lead_ds.engine.distributed.deepspeed_files import student_deepspeed_config
from lead_ds.engine.distributed.ranks import free_port
from lead_ds.engine.distributed.signals import Signals
from lead_ds.engine.distributed.watchdog import Watchdog, missing
from lead_ds.engine.training.distill import distill
from lead_ds.engine.training.resume import check_inputs
from lead_ds.errors import InputError, RunError
from lead_ds.io.mapped import locked
from lead_ds.models.load import load_text
from lead_ds.models.vocabulary import check_vocabulary
from lead_ds.retrieval.evaluate import open_encoder
from lead_ds.teachers.fit_lens import Fit, fit_lens
from lead_ds.teachers.teach import teach
from tests.helpers.deepspeed_files import filled_teacher

Configure = Callable[..., Path]
ALONE: Any = type(
    "Alone",
    (),
    {"rank": 0, "world": 1, "main": True, "from_main": lambda _, value: value, "all": lambda _, value: [value]},
)()


def test_a_pad_token_beyond_the_embeddings(rooms: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scorer, encoder = open_encoder(str(rooms / "student"), "cpu")
    tokenizer = encoder.tokenizer
    check_vocabulary(scorer, encoder, "student")
    assert not capsys.readouterr().err
    tokenizer.add_tokens(["a word of later"] * 1 + [f"later{i}" for i in range(1000)])
    check_vocabulary(scorer, encoder, "student")
    assert "embeddings, its tokenizer's token" in capsys.readouterr().err
    assert encoder.passages(["a word of now"])["input_ids"].shape[0] == 1
    with pytest.raises(
        InputError, match=r"student: has \d+ embeddings, and none for 'later7' .* in the text .*holds later7"
    ):
        encoder.passages(["a word of now", "this holds later7 and more"])
    tokenizer.add_special_tokens({"pad_token": "<a new pad>"})
    with pytest.raises(InputError, match=r"student: has \d+ embeddings, its tokenizer's token '<a new pad>' is \d+"):
        check_vocabulary(scorer, encoder, "student")


def test_a_frozen_teachers_pad_token_beyond_its_embeddings(configure: Configure, rooms: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(rooms / "llama", tmp_path / "teacher"))
    tokenizer = load_text(load_config(configure()).taught["teacher"]).tokenizer
    tokenizer.add_tokens([f"later{i}" for i in range(1000)])
    tokenizer.add_special_tokens({"pad_token": "<a new pad>"})
    tokenizer.save_pretrained(folder)
    path = configure("run", extra_teacher={"path": str(folder)})
    with pytest.raises(InputError, match=rf"^{folder}: has \d+ embeddings, its tokenizer's token '<a new pad>' is"):
        distill(load_config(path), quiet=True)
    assert not (tmp_path / "run" / "config.yaml").exists()
    told = rf"^{folder}: has \d+ embeddings, its tokenizer's token '<a new pad>' is"
    with pytest.raises(InputError, match=told):
        teach(load_config(path), tmp_path / "cache", quiet=True)
    with pytest.raises(InputError, match=told):
        fit_lens(load_config(path), tmp_path / "lens", Fit(), quiet=True)


def filled(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """The student's DeepSpeed configuration of a run."""
    return student_deepspeed_config(config.deepspeed.student, config.train, config.monitor, Path(config.output), dtype)


@pytest.mark.parametrize(
    ("tree", "name"),
    [
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}, "zero_optimization.reduce_bucket_size"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}}, "optimizer.params.betas"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": ["auto", 0.9]}}}, "optimizer.params.betas"),
    ],
)
def test_an_auto_that_nobody_fills_in(configure: Configure, tree: dict[str, Any], name: str) -> None:
    config = load_config(configure(deepspeed={"student": tree}))
    with pytest.raises(InputError, match=rf'^deepspeed.student: {name} (is|holds) "auto"'):
        filled(config, torch.float32)


def test_autos_that_are_filled_in_stay_welcome(configure: Configure) -> None:
    tree = {
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "fp16": {"enabled": "auto"},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
    }
    config = load_config(configure(deepspeed={"student": tree}))
    for dtype in (torch.float32, torch.bfloat16):
        assert '"auto"' not in json.dumps(filled(config, dtype))
    zero = {"zero_optimization": {"stage": 3, "sub_group_size": "auto"}}
    with pytest.raises(InputError, match=r"zero_optimization\.sub_group_size"):
        filled_teacher(zero, dtype=torch.float32)


def test_what_deepspeed_refuses_is_named(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "student.json").write_text(
        json.dumps({"zero_optimization": {"stage": 1, "reduce_bucket_size": "many"}})
    )
    path = configure("run", deepspeed={"student": str(tmp_path / "student.json")})
    with pytest.raises(InputError) as told:
        distill(load_config(path), quiet=True)
    assert str(told.value).startswith(f"deepspeed.student: {tmp_path}/student.json: reduce_bucket_size: ")
    assert "not 'many'" in str(told.value)
    assert "pydantic" not in str(told.value)


def test_a_pad_token_of_the_configuration_beyond_the_table(rooms: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(rooms / "student", tmp_path / "student"))
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | {"pad_token_id": 9999}))
    with pytest.raises(
        InputError, match=r"the pad_token_id of its config\.json is beyond its table of words \(set it to"
    ):
        open_encoder(str(folder), "cpu")


def test_judgements_that_are_all_nothing_are_told_before_training(
    configure: Configure, rooms: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(rooms / "data", tmp_path / "data"))
    dev = data / "qrels" / "dev.tsv"
    head, *lines = dev.read_text().splitlines()
    dev.write_text("\n".join([head, *(line.rsplit("\t", 1)[0] + "\t0" for line in lines)]) + "\n")
    path = configure("run", data={"path": str(data)}, evaluation={"split": "dev"})
    with pytest.raises(InputError, match=r"dev\.tsv: no judgement is 1 or more, .*\(check the judgements\)"):
        distill(load_config(path), quiet=True)
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_fp16_on_a_cpu(configure: Configure) -> None:
    with pytest.raises(InputError, match=r"fp16 is for GPUs.*bf16, fp32 or auto"):
        filled(load_config(configure()), torch.float16)


def test_half_a_character(rooms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"_id": "a", "text": "\\ud83d"}\n')
    with pytest.raises(InputError, match=r"corpus\.jsonl:1: not valid JSON: .*surrogate.*half a character"):
        Texts.open(tmp_path / "corpus.jsonl", "corpus")
    student = Path(shutil.copytree(rooms / "student", tmp_path / "student"))
    (student / "config_sentence_transformers.json").write_text('{"prompts": {"query": "\\ud83d "}}')
    with pytest.raises(InputError, match=rf"^{student}: its query_prompt .* holds half a character"):
        open_encoder(str(student), "cpu")
    with pytest.raises(SystemExit) as ended:
        main(["search", "--model", "m", "caf\udce9"])
    assert ended.value.code == 2
    assert "an argument: is not UTF-8: 'caf\\udce9'" in capsys.readouterr().err


START = "from lead_ds.engine.distributed.ranks import ranks\nfrom lead_ds.cli.main import main\n{}\nwith ranks(): pass"


def environment(port: int, world: int) -> dict[str, str]:
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    return {**os.environ, **place, "MASTER_PORT": str(port)}


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-c", START.format("")], env=environment(port, 1), capture_output=True, text=True
        )
    assert f"RunError: MASTER_PORT {port}: is in use on this host" in done.stderr


def test_who_waits_is_told_what_for() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", START.format("")], env=environment(port, 2), stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        started = time.monotonic()
        line = next(line for line in process.stderr if "has waited" in line)
        assert "rank 0 on " in line
        assert f"for all of 2 processes to meet at 127.0.0.1:{port}; missing: rank 1: is each" in line
        assert time.monotonic() - started < 300  # and not after half an hour
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("place", "rank", "told"),
    [
        ("nobody", "1", "nobody answers there, so rank 0 is missing"),
        ("nobody", "0", "this is rank 0, and cannot reach itself there"),
        ("no host", "1", "no host has that name"),
        ("another program", "1", "another program may have the port"),  # which never says a word
    ],
)
def test_what_is_wrong_with_the_meeting_point_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str, rank: str, told: str
) -> None:
    monkeypatch.setattr(ranks, "WAIT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1] if place == "another program" else free_port()
        address = "nohost.invalid" if place == "no host" else "127.0.0.1"
        facts = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": port}
        for name, value in facts.items():
            monkeypatch.setenv(name, str(value))
        said, deadline = "", time.monotonic() + 600
        with ranks._told_while_waiting():
            while told not in said and time.monotonic() < deadline:
                time.sleep(0.2)
                said += capsys.readouterr().err
    assert f"for all of 2 processes to meet at {address}:{port}; " in said
    assert told in said


@pytest.mark.parametrize(
    ("place", "told"),
    [
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
            r"MASTER_ADDR: RANK is set in the environment, and this is",
        ),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
            "is 2 of WORLD_SIZE 2",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
            "WORLD_SIZE: is 'two' in the environment, and no number",
        ),
    ],
)
def test_half_a_place_is_refused(monkeypatch: pytest.MonkeyPatch, place: dict[str, str], told: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=told), ranks.ranks():
        pass


def test_a_lock_of_ours_that_another_process_has_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lead_ds.io.waiting.WAIT", 0.2)
    monkeypatch.setenv("LEAD_DS_CACHE", str(tmp_path))
    target = tmp_path / "corpus.jsonl"
    with locked(target):  # this process, which has it, asks for it again
        threading.Thread(target=lambda: locked(target).__enter__(), daemon=True).start()
        told, deadline = "", time.monotonic() + 600
        while "has waited" not in told and time.monotonic() < deadline:
            time.sleep(0.05)
            told += capfd.readouterr().err
    assert re.search(
        rf"has waited \d+ s for process {os.getpid()} \(.*\), which makes {target}: end it if it hangs", told
    )


def test_a_lock_that_was_left_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lead_ds.engine.distributed.watchdog.WAIT", 0.5)
    lock = tmp_path / "fused_adam" / "lock"
    lock.parent.mkdir()
    with lock.open("w"):
        assert [one["held"] for one in batons([tmp_path, tmp_path / "absent"])] == [True]
    [left] = batons([tmp_path])
    assert (left["path"], left["held"]) == (str(lock), False)
    with Watchdog(ALONE, 1, tmp_path / "run", Signals()):
        threading.Timer(3, lock.unlink).start()
        FileBaton(str(lock)).wait()  # as PyTorch waits for another compiler
    told = capfd.readouterr().err
    assert re.search(
        rf"rank 0 .* has waited \d s for the lock {lock}, which no process of this host has open: delete", told
    )


def test_a_compiler_that_takes_its_time_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lead_ds.engine.distributed.watchdog.WAIT", 0.5)
    (tmp_path / "build.ninja").write_text("rule wait\n  command = sleep 4\nbuild done: wait\n")
    with Watchdog(ALONE, 1, tmp_path / "run", Signals()):
        cpp_extension._run_ninja_build(str(tmp_path), verbose=False, error_prefix="")
    assert re.search(rf"rank 0 .* has waited \d s for the compiler in {tmp_path}: once", capfd.readouterr().err)


def test_whom_ranks_wait_for() -> None:
    def entry(collective: str | None, lock: str | None = None) -> dict[str, Any]:
        return {"collective": collective, "lock": lock, "pid": 7, "host": "h", "place": "loading data and models"}

    entries = {0: entry(None, "/x/lock"), 1: entry("all_gather_object"), 2: None, 3: entry("all_gather_object")}
    assert missing(entries, 1) == [
        "rank 0 (process 7 on h) in loading data and models, waiting for the lock /x/lock",
        "rank 2, which has not answered yet",
    ]
    assert missing(entries, 3) == []  # one of them tells
    assert missing({0: entry("barrier"), 1: entry("barrier")}, 0) == []


def test_a_run_goes_on_with_its_own_tokenizer_and_optimizer(configure: Configure, rooms: Path, tmp_path: Path) -> None:
    student = Path(shutil.copytree(rooms / "student", tmp_path / "student"))

    def check(state: dict[str, Any], accepted: Sequence[str] = (), **sections: Any) -> None:
        config = load_config(configure(student={"path": str(student)}, **sections))
        reads = Reads(load_text(config.student))
        batches = Batches(open_groups(config.data), reads, {}, config.data, config.train, seed=0, ranks=ALONE)
        check_inputs(config, state, batches, ALONE, accepted=accepted)

    optimizer = {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}
    state: dict[str, Any] = {}
    check(state, deepspeed={"student": {"optimizer": optimizer}})
    check(state, deepspeed={"student": {"optimizer": optimizer, "zero_optimization": {"stage": 2}}})  # the same result
    other = {"type": "AdamW", "params": {"betas": [0.9, 0.99]}}
    with pytest.raises(InputError, match=r"files that have changed: deepspeed: optimizer"):
        check(state, deepspeed={"student": {"optimizer": other}})
    tree = json.loads((student / "tokenizer.json").read_text())
    words = sorted(tree["model"]["vocab"], key=tree["model"]["vocab"].__getitem__)
    words[-1], words[-2] = words[-2], words[-1]
    tree["model"]["vocab"] = {word: number for number, word in enumerate(words)}
    (student / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(InputError, match=r"files that have changed: .*tokenizer: student"):
        check(state, deepspeed={"student": {"optimizer": optimizer}})
    accepted = dict(state, step=7)
    with pytest.raises(InputError, match="accept-changed: corpus has not changed since the last checkpoint"):
        check(dict(accepted), accepted=["student", "corpus"], deepspeed={"student": {"optimizer": optimizer}})
    check(accepted, accepted=["student"], deepspeed={"student": {"optimizer": optimizer}})
    told = {one.pop("name"): one for one in accepted["accepted"]}
    assert told.keys() == {"tokenizer: student", "student: tokenizer.json"}
    assert all(one["step"] == 7 and one["was"] != one["is"] for one in told.values())
    check(accepted, deepspeed={"student": {"optimizer": optimizer}})  # known from here on
    with pytest.raises(InputError, match="accept-changed: student has not changed"):
        check(accepted, accepted=["student"], deepspeed={"student": {"optimizer": optimizer}})
    (student / "config.json").write_text((student / "config.json").read_text() + " ")
    with pytest.raises(InputError, match=r"files that have changed: student: config.json"):
        check(accepted, deepspeed={"student": {"optimizer": optimizer}})
    older = {"inputs": {name: told for name, told in state["inputs"].items() if name.startswith(("data", "teacher"))}}
    check(older, deepspeed={"student": {"optimizer": other}})  # nothing is known of what it was
