"""Ranks that were started differently would compute nonsense together, or wait for ever: they are refused at start."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from lead_ds.engine.distributed.deepspeed_files import read_deepspeed_config
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.errors import InputError, LeadError
from lead_ds.io.facts import flat
from lead_ds.io.files import model_files
from lead_ds.io.provenance import versions
from lead_ds.settings.meaning import means
from lead_ds.settings.run import Run

T = TypeVar("T")

WHOLE, SAMPLES, SAMPLE = 1 << 26, 64, 1 << 16  # bytes: files up to WHOLE are read whole, of others SAMPLES pieces
VISIBLE = 15.0  # seconds in which a network file system must show a new file


def agreed(ranks: Ranks, act: Callable[[], T]) -> T:
    """`act()`, which does not communicate; where it fails on any rank, every rank raises the first one's error.

    Otherwise the failing rank would leave, and the others wait for it.
    """
    result: list[T] = []
    failure: LeadError | None = None
    try:
        result.append(act())
    except LeadError as error:
        failure = error
    failures = ranks.all(failure)
    first = next((rank for rank, failure in enumerate(failures) if failure is not None), None)
    if first is None:
        return result[0]
    cause = failures[first]
    assert cause is not None
    if None in failures:  # not on all: say whose machine to look at
        host = ranks.all(socket.gethostname())[first]
        raise type(cause)(cause.where, f"rank {first} on {host}: {cause.what}", cause.remedy)
    raise cause


def check_agreement(config: Run, resume: bool, ranks: Ranks) -> None:
    """Raise InputError on every rank, naming rank and key, where configuration, package versions or files differ."""
    if ranks.world == 1:
        return
    mine = agreed(ranks, lambda: {**facts(config), "--resume": str(resume)})
    digest = hashlib.blake2b(json.dumps(mine, sort_keys=True).encode(), digest_size=16).hexdigest()
    digests = ranks.all(digest)
    if len(set(digests)) == 1:
        return
    everyone, hosts = ranks.all(mine), ranks.all(socket.gethostname())
    rank = next(r for r, other in enumerate(digests) if other != digests[0])
    first, other = everyone[0], everyone[rank]
    key = next(k for k in sorted({*first, *other}) if first.get(k) != other.get(k))
    raise InputError(
        key,
        f"rank {rank} on {hosts[rank]} has {other.get(key, 'none')}, rank 0 on {hosts[0]} has {first.get(key, 'none')}",
        "start every rank with the same configuration, packages and files",
    )


def facts(config: Any) -> dict[str, str]:
    """What must be the same on every rank: settings by dotted key, versions, files by name with size and checksum.

    Where the same files are may differ between machines; what is in them may not, nor where all processes write to.
    config: a whole configuration (`lead_ds.config.Config`).
    """
    free = {key for key, mark in means(config).items() if mark.meaning == "place" and not mark.shared}
    found = {key: json.dumps(value) for key, value in flat(config.model_dump(mode="json"), free=free)}
    for name in ("student", "teacher"):
        source = read_deepspeed_config(getattr(config.deepspeed, name))
        found |= {f"deepspeed.{key}": json.dumps(value) for key, value in flat(source, name)}
    found |= {f"version of {name}": version for name, version in versions().items()}
    names, files = ("corpus.jsonl", "corpus.jsonl.gz", "queries.jsonl", "queries.jsonl.gz"), dict[str, Path]()
    for label, part in config.data.by_name.items():
        at, folder = f"{label}: " if config.data.sets else "", Path(part.path)
        train = folder / part.train
        files |= {f"{at}data.train": train, **{at + name: folder / name for name in names}}
        split = f"qrels/{config.evaluation.split}.tsv"
        files[f"{at}{split}"] = Path(config.evaluation.path or folder) / split
        files |= {f"{at}data.train: {file.name}": file for file in (sorted(train.iterdir()) if train.is_dir() else ())}
    if config.evaluation.run is not None:
        files["evaluation.run"] = Path(config.evaluation.run)
    for name, path in files.items():
        if (content := summary(path)) is not None:
            found[name] = content
    for model, section in {"student": config.student, **config.taught}.items():
        if os.path.isdir(getattr(section, "path", "")):
            for file_name, file in model_files(Path(section.path)).items():
                content = summary(file)
                if content is not None:
                    found[f"{model}: {file_name}"] = content
    for key, teacher in config.taught.items():
        folder = Path(getattr(teacher, "lens_path", None) or config.lens_folder)
        if (lens := summary(folder / "lens.json")) is not None:  # which holds the checksum of all of it
            found[f"tuned lens of {key}"] = lens
    return found


def summary(path: Path) -> str | None:
    """Size and checksum of a file; of a large one, of pieces at even distances. None where there is none."""
    if not path.is_file():
        return None
    size = path.stat().st_size
    digest = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        if size <= WHOLE:
            while block := file.read(1 << 22):
                digest.update(block)
        else:
            for piece in range(SAMPLES):
                file.seek(piece * (size - SAMPLE) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE))
    return f"{size} bytes, checksum {digest.hexdigest()}"


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Raise InputError on every rank where a machine does not see what rank 0 writes: checkpoints are written by all."""
    hosts = ranks.all(socket.gethostname())
    if len(set(hosts)) == 1:
        return
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    name = ranks.from_main(f".lead-ds-{os.getpid()}-{time.time_ns()}")
    mark = Path(ranks.from_main(str(nearest.absolute()))) / name
    failure = ranks.from_main(_touch(mark) if ranks.main else "")
    if failure:
        raise InputError(folder, f"cannot be written: {failure}", "set output= to another folder")
    deadline = time.monotonic() + VISIBLE
    while not (seen := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.5)
    blind = [rank for rank, sees in enumerate(ranks.all(seen)) if not sees]
    if ranks.main:
        mark.unlink(missing_ok=True)
    if blind:
        raise InputError(
            folder,
            f"rank {blind[0]} on {hosts[blind[0]]} does not see what rank 0 on {hosts[0]} writes there",
            "set output= to a folder that all machines share",
        )


def _touch(path: Path) -> str:
    try:
        path.touch()
    except OSError as error:
        return error.strerror or str(error)
    return ""
