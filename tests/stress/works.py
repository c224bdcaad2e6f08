"""The jobs that are killed: how each is begun or continued, what it gives, and what of it is complete."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from lead_ds.cli import main
from lead_ds.config import load_config
from lead_ds.data.collections.dataset import Dataset
from lead_ds.engine.distributed.ranks import free_port
from lead_ds.engine.records.checkpoint import damage
from lead_ds.io.fingerprints import Fingerprints
from lead_ds.io.shards import mapped
from lead_ds.pipeline.run import run_pipeline
from lead_ds.retrieval.encode import Encoding, Stored, encode_to
from lead_ds.retrieval.evaluate import open_encoder
from lead_ds.retrieval.index import META, RESCORE, build_index
from lead_ds.retrieval.search import model_facts
from lead_ds.retrieval.vectors import Vectors
from lead_ds.teachers.teach import teach
from tests.engine.jobs import losses_of
from tests.helpers.launch import ROOT
from tests.helpers.rooms import make_rooms, settings
from tests.stress.attempt import Job
from tests.stress.phases import Phases

TINY = ROOT / "tests" / "pipeline" / "tiny.yaml"
FEWER = ["pipeline.models=[distilled]", "pipeline.evaluate=[{split: test}]", "pipeline.lens={steps: 20}"]
WORLD, KEEP = 2, 3
# Phases of every job: what is atomic ends by these.
FILES = {"syncing": "os:fsync", "renaming": "os:replace", "removing": "shutil:rmtree"}
TRAINING = {
    "reading input": "lead_ds.engine.training.distill:open_inputs",
    "building the engine": "lead_ds.engine.training.distill:build_engine",
    "a step": "lead_ds.engine.training.loop:Training.optimize",
    "evaluating": "lead_ds.engine.training.loop:Training.evaluate",
    "saving": "lead_ds.engine.records.checkpoint:Checkpoints.save",
    "completing a checkpoint": "lead_ds.engine.records.checkpoint:Checkpoints._complete",
    "cleaning": "lead_ds.engine.records.checkpoint:remove",
    "exporting": "lead_ds.engine.training.distill:export",
}
EMBEDDING = {"embedding": "lead_ds.models.kinds.kind:Kind.embed"}
TEACHING = {"a turn": "lead_ds.teachers.reading:Reader.read", "writing": "lead_ds.io.shards:save_arrays"}
KEPT = ("relevance-", "queries-", "passages-", "index.safetensors")  # of a teacher's cache
Files = Mapping[str, str]


@dataclass(frozen=True)
class Work:
    """One kind of job, which writes into a folder.

    begin: rooms, folder -> its processes' jobs, that continue what is there. product: what must come out the same. complete:
    what lies under a final name, with a digest of what it must hold ("": it checks itself). victims: those that are killed
    together; -1: a pipeline's stage. keep: it removes all but its last so many. resumes: parts that are complete are not made
    again. share: of all kills. full: whether its disk is made full, too.
    """

    name: str
    share: int
    begin: Callable[[Path, Path], Sequence[Job]]
    product: Callable[[Path], Any]
    complete: Callable[[Path], Files]
    spots: Mapping[str, str]
    victims: Sequence[Sequence[int]] = ((0,),)
    keep: int = 0
    resumes: bool = True
    done: Callable[[Path], bool] = field(default=lambda out: False)
    full: bool = True


def prepare_rooms(folder: Path) -> Path:
    """What the jobs read, made by a process of its own: the one that forks must not have computed."""
    rooms = folder / "rooms"
    if (pid := os.fork()) == 0:
        make_rooms(rooms)
        with zipfile.ZipFile(rooms / "beir.zip", "w") as archive:
            for path in (rooms / "data").rglob("*"):
                if path.suffix in (".jsonl", ".tsv") and path.name != "train.jsonl":
                    archive.write(path, f"x/{path.relative_to(rooms / 'data')}")
        encoded(rooms, rooms / "vectors")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    return rooms


def digest(path: Path) -> str:
    """Of a file's bytes; of safetensors, whose metadata has any order, its tensors' own checksum."""
    if path.name.startswith(KEPT):
        return str(mapped(path)[1]["checksum"])
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def digests(out: Path, *patterns: str) -> Files:
    """Of the files under their final names."""
    found = {path for pattern in patterns for path in out.glob(pattern) if path.is_file()}
    return {path.relative_to(out).as_posix(): digest(path) for path in sorted(found)}


def unsummed(out: Path) -> Files:
    """Of vectors: the manifest without the checksums of the other files, which it gets when these are all there."""
    found = dict(digests(out, *VECTORS))
    if "manifest.json" in found:
        facts = json.loads((out / "manifest.json").read_text())
        facts.pop("checksums", None)
        found["manifest.json"] = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
    return found


def command(*words: object) -> Callable[[], None]:
    """`lead-ds WORDS`."""

    def run() -> None:
        sys.argv = ["lead-ds", *map(str, words)]
        main(sys.argv[1:])

    return run


def training_config(rooms: Path, out: Path, **sections: Any) -> Path:
    """The configuration of a run into `out`."""
    train = {"steps": 12, "batch_size": 2, "save_every": 2, "evaluate_every": 4, "keep": KEEP}
    tree = settings(
        rooms,
        out,
        extra_teacher={"placement": "zero3", **sections.pop("extra_teacher", {})},
        student={"path": "dropout"},
        train=train,
        evaluation={"split": "dev", "measures": ["nDCG@10"]},
        **sections,
    )
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree))
    return path


def distilling(rooms: Path, out: Path) -> list[Job]:
    config, port = training_config(rooms, out), str(free_port())
    words = ["distill", config, "--quiet", *(["--resume"] if (out / "config.yaml").exists() else [])]
    place = {"WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [Job(command(*words), {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(WORLD)]


def distilled(out: Path) -> Any:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return losses_of(out), [row["evaluation"] for row in rows if "evaluation" in row], digest(weights(out))


def weights(run: Path) -> Path:
    return run / "student" / "model.safetensors"


def checkpoints(out: Path) -> Files:
    found = sorted(out.glob("checkpoints/step-*[0-9]"))
    broken = {path.name: damage(path) for path in found if damage(path) is not None}
    assert not broken, broken
    exported = {"student": digest(weights(out))} if (out / "student").exists() else {}
    return {path.name: "" for path in found} | exported


def encoded(rooms: Path, out: Path) -> None:
    scorer, encoder = open_encoder(str(rooms / "student"))
    corpus = Dataset.open(rooms / "data").corpus
    facts = model_facts(str(rooms / "student"), scorer)
    encode_to(out, scorer.embed, encoder, corpus, facts, Encoding(4), Stored(shard_rows=4))


def indexed(rooms: Path, out: Path) -> None:
    vectors = Vectors.open(rooms / "vectors")
    build_index(vectors, out, "HNSW8", rescore=vectors, quiet=True)


def taught(config: Path, out: Path, vectors: str | None = None) -> None:
    teach(load_config(config), out, vectors=vectors, shard_size=4, quiet=True)


def evaluating(rooms: Path, out: Path) -> list[Job]:
    out.mkdir(exist_ok=True)
    words = ["evaluate", "--model", rooms / "student", "--data", rooms / "data", "--split", "dev", "--per-query"]
    return [Job(command(*words, "--json", out / "values.json", "--out", out / "run.trec"))]


def mining(rooms: Path, out: Path) -> list[Job]:
    words = ["mine", "--data", rooms / "data", "--out", out / "mined.jsonl", "--model", rooms / "student"]
    words += ["--number", 5, "--depth", 20, "--rescore", rooms / "cross", "--rescore-set", "kind=cross_encoder"]
    return [Job(command(*words))]


def pipelined(rooms: Path, out: Path) -> list[Job]:
    paths = {"teacher.path": rooms / "cross", "student.path": rooms / "student", "data.path": rooms / "data"}
    overrides = [*(f"{key}={path}" for key, path in paths.items()), f"output={out}", *FEWER]
    return [Job(partial(run_pipeline, TINY, overrides, run=forked_stage))]


def forked_stage(words: Sequence[str], log: Path, keep: int) -> int:
    """A pipeline's command in a process forked from the pipeline's, which may outlive it, as one that it starts does."""
    pid = os.fork()
    if pid:
        assert Phases.here is not None
        Phases.here.stage = pid
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        command(*words[1:])()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        os._exit(status)


def results(out: Path) -> Any:
    [student] = out.glob("stages/distill-*/run/student/model.safetensors")
    return digest(student), json.loads((out / "results.json").read_text())["results"]


def stages(out: Path) -> Files:
    """The stages that are finished, whose outputs are as they were recorded; a report holds times, and no two are equal."""
    found, files = [], Fingerprints(out / "none.json")
    for path in sorted(out.glob("stages/*/stage.json")):
        record = json.loads(path.read_text())
        if record.get("finished"):
            found.append(path.parent.name)
            broken = [name for name, value in record["outputs"].items() if files.file(path.parent / name) != value]
            assert not broken, broken
    return dict.fromkeys(found, "")


def one(act: Callable[..., object], *arguments: Any) -> list[Job]:
    return [Job(partial(act, *arguments))]


VECTORS = ("*.npy", "ids.txt", "manifest.json")
INDEX = ("*.faiss", "ids.txt", META, f"{RESCORE}/*.npy", f"{RESCORE}/ids.txt")
PREPARED = ("*.jsonl", "qrels/*.tsv")
WORKS = {
    work.name: work
    for work in (
        Work(
            "distill",
            20,
            distilling,
            distilled,
            checkpoints,
            TRAINING | FILES,
            victims=([0], [1], [0, 1]),
            keep=KEEP,
        ),
        Work(
            "encode",
            14,
            lambda rooms, out: one(encoded, rooms, out),
            lambda out: digests(out, *VECTORS),
            unsummed,
            EMBEDDING | {"writing": "lead_ds.retrieval.encode:_write_shard"} | FILES,
        ),
        Work(
            "teach",
            12,
            lambda rooms, out: one(taught, training_config(rooms, out), out),
            lambda out: digests(out, "*.safetensors"),
            lambda out: digests(out, "*.safetensors"),
            TEACHING | FILES,
            full=False,  # without room for the vectors of all texts, shards are made in another way, with other rounding
        ),
        Work(
            "teach vectors",
            8,
            lambda rooms, out: one(taught, training_config(rooms, out), out, "0"),
            lambda out: digests(out, "*.safetensors"),
            lambda out: digests(out, "*.safetensors"),
            TEACHING | FILES,
        ),
        Work(
            "index",
            12,
            lambda rooms, out: one(indexed, rooms, out),
            lambda out: digests(out, *INDEX),
            lambda out: digests(out, *INDEX),
            {"copying": "shutil:copyfile"} | FILES,
            resumes=False,
            done=lambda out: (out / META).exists(),
        ),
        Work(
            "mine",
            10,
            mining,
            lambda out: digests(out, "mined.jsonl"),
            lambda out: digests(out, "mined.jsonl"),
            EMBEDDING | {"scoring again": "lead_ds.retrieval.rescore:rescore"} | FILES,
            resumes=False,
        ),
        Work(
            "evaluate",
            10,
            evaluating,
            lambda out: digests(out, "*.json", "*.trec"),
            lambda out: digests(out, "*.json", "*.trec"),
            EMBEDDING | FILES,
            resumes=False,
        ),
        Work(
            "prepare",
            12,
            lambda rooms, out: [Job(command("prepare", "beir", rooms / "beir.zip", out))],
            lambda out: digests(out, *PREPARED),
            lambda out: digests(out, *PREPARED),
            {"a file": "lead_ds.prepare.build:Builder.stale"} | FILES,
        ),
        Work(
            "pipeline",
            8,
            pipelined,
            results,
            stages,
            TRAINING | FILES | EMBEDDING | {"a stage": "lead_ds.pipeline.run:work"},
            victims=([0], [-1], [0, -1]),
        ),
    )
}
