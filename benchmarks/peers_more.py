"""Further rows of `benchmarks.peers`: a teacher that runs along, encoding, and `teach` beside encoding."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import peers_data

Row = dict[str, Any]
Size = dict[str, Any]


def online(work: Path, models: Path, size: Size, done: set[str]) -> Iterator[Row]:
    """lead-ds's step, its teacher computed, over the bare teacher forward + student forward and backward."""
    from benchmarks.throughput import main

    for loss, teacher in (("kl", "reranker-l12"), ("embed", "bge-small")):
        for passes in (None, "auto"):
            name = f"{teacher}, passes {passes}"
            if name in done:
                continue
            both = {"passes": passes}
            tree = peers_data.configuration(work, models, loss, size, str(work / "student"), teacher=both, student=both)
            tree |= {"output": str(work / "online")}
            tree["train"] |= {"batch_size": 4, "steps": 100}
            tree["data"]["negatives"] = size["negatives"]
            out = work / "online.json"
            out.unlink(missing_ok=True)
            path = peers_data.written(work / "online.yaml", tree)
            given = ["--config", str(path), "--providers", "lead-ds,bare", "--clock", "processor", "--steps", "6"]
            main([*given, "--rounds", "2", "--warmup", "1", "--folder", str(work / "online-files"), "--out", str(out)])
            rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
            ratio = next(row["value"] for row in rows if row["metric"] == "overhead ratio")
            yield {"name": name, "ratio": ratio, "rows": rows, "shown": f"step / bare: {ratio:.3f}"}


def encoding(work: Path, models: Path, size: Size, done: set[str]) -> Iterator[Row]:
    """Passages a second of both, the same precision for both."""
    from benchmarks.encode import measure

    for precision in ("fp32", "bf16"):
        if precision in done:
            continue
        row = measure(
            argparse.Namespace(
                model=str(work / "student"), data=work / "data", texts=400, batch_size=16, their_batch_size=32, rounds=3,
                threads=1, device="cpu", precision=precision, their_precision=precision,
            )
        )  # fmt: skip
        shown = f"{row['ratio_processor']:.2f}x of processor time, {row['ratio_wall']:.2f}x by the wall's clock"
        yield {"name": precision, **row, "shown": shown}


def teaching(work: Path, models: Path, size: Size, done: set[str]) -> Iterator[Row]:
    """`lead-ds teach` of a dual encoder over groups that repeat passages, against encoding each of their texts once."""
    tree = peers_data.configuration(work, models, "embed", size, str(work / "student"))
    tree["data"]["negatives"] = size["negatives"]
    tree["output"] = str(work / "teaching")
    groups = [json.loads(line) for line in (work / "data" / "train.jsonl").read_text("utf-8").splitlines()]
    named = [passage for group in groups for passage in (*group["positives"], *group["negatives"])]
    wanted = {*named, *(group["query_id"] for group in groups)}
    texts = work / "texts.jsonl"
    lines = [
        line
        for name in ("queries.jsonl", "corpus.jsonl")
        for line in (work / "data" / name).read_text("utf-8").splitlines()
        if json.loads(line)["_id"] in wanted
    ]
    texts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    spec = {"library": "encode", "student": tree["teacher"]["path"], "batches": str(texts), "length": size["length"]}
    path = peers_data.written(work / "encode.json", spec)
    ways: dict[str, list[str]] = {
        "sentence-transformers": [str(Path(__file__).with_name("peers_theirs.py")), str(path)],
    }
    for dtype in ("fp32", "bf16"):
        tree["teacher"] = {**tree["teacher"], "dtype": dtype}
        config = peers_data.written(work / f"teach-{dtype}.yaml", tree)
        for kind, more in (("relevance", []), ("vectors", ["--vectors", "final"])):
            out = work / f"taught-{dtype}-{kind}-{int(time.time())}"
            command = ["-m", "lead_ds", "teach", str(config), "--out", str(out), *more]
            ways[f"teach, {dtype}, {kind}"] = command
    for name, command in ways.items():
        if name not in done:
            spent = timed(command)
            what = f"{len(named)} passages named, {len(lines)} distinct texts"
            shown = (
                f"{spent['processor']:.1f} s of processor time, {spent['wall']:.1f} s, {spent['peak']:,.0f} MiB; {what}"
            )
            yield {"name": name, **spent, "named": len(named), "texts": len(lines), "shown": shown}


def timed(command: list[str]) -> dict[str, float]:
    """A Python process from its command to its end: seconds, and MiB at most.

    Its memory is read from /proc while it runs: what `wait4` reports counts this process's own, which began it.
    """
    began, peak = time.time(), 0.0
    environment = {**os.environ, "PEERS_STARTED": str(began), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, env=environment)
    status = Path(f"/proc/{process.pid}/status")
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        fields = dict(line.split(":", 1) for line in status.read_text("utf-8").splitlines())
        if "VmHWM" in fields:  # one that ends at this moment has none
            peak = float(fields["VmHWM"].split()[0]) / 1024
        time.sleep(0.05)
    ended = time.time()
    _, code, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(code)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return {"processor": used.ru_utime + used.ru_stime, "wall": ended - began, "peak": peak}


ROWS: dict[str, Callable[[Path, Path, Size, set[str]], Iterator[Row]]] = {
    "online": online,
    "encode": encoding,
    "teach": teaching,
}
