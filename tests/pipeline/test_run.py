"""What is done, continued and made anew, over stages whose commands write a few bytes instead of training.

The commands themselves run in `test_pipeline`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from lead_ds.errors import InputError, RunError
from lead_ds.io.files import alone
from lead_ds.pipeline.run import Choice, run_pipeline
from tests.helpers.launch import ROOT
from tests.helpers.tiny import tiny_dataset

TINY = Path(__file__).with_name("tiny.yaml")
STAGES = [
    *["negatives", "first", "mine", "teacher", "student", "teach", "distill", "report"],
    *["encode-first", "index-first", "search-first-dev", "evaluate-first-dev"],
    *["search-first-test", "evaluate-first-test"],
    *["encode", "index", "search-dev", "evaluate-dev", "search-test", "evaluate-test"],
]
EVALUATED = STAGES[8:]


class Commands:
    """Stands for the commands: writes what each would write, and remembers it; `failing` ends with `status`."""

    def __init__(self) -> None:
        self.given: list[list[str]] = []
        self.failing, self.status, self.says = "", 1, ""
        self.salt = ""

    def __call__(self, command: Sequence[str], log: Path, keep: int) -> int:
        self.given.append(list(command))
        words = list(command[command.index("lead-ds") + 1 :] if "lead-ds" in command else command)
        kind = words[0]
        place = [word.removeprefix("output=") for word in words if word.startswith("output=")][-1:]
        out = Path(place[0] if place else words[-1])
        if kind in ("warmup", "distill"):
            write(out / "config.yaml", "begun")
        if kind == self.failing:
            log.write_text(self.says)
            return self.status
        text = f"{self.salt} {kind}"
        if kind in ("warmup", "distill"):
            write(out / ("model" if kind == "warmup" else "student") / "model.safetensors", text)
        elif kind == "evaluate":
            names = words[words.index("--measures") + 1].split()
            values = {name: {"q1": 0.25, "q2": 0.75} for name in names}
            write(out, json.dumps({"mean": dict.fromkeys(names, 0.5), "per_query": values}))
        else:
            write(out if out.suffix in (".jsonl", ".trec") else out / "part", text)
        return 0

    def stages(self) -> list[str]:
        """Names of the stages whose commands were given since the last call."""
        found = []
        for command in self.given:
            place = next(word for word in reversed(command) if "/stages/" in word and not word.startswith("data."))
            found.append(place.split("/stages/")[1].split("/")[0].rsplit("-", 1)[0])
        self.given.clear()
        return found


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


class Place:
    """A recipe over tiny data, and how to run it."""

    def __init__(self, root: Path) -> None:
        self.root, self.output, self.commands = root, root / "out", Commands()
        self.data = tiny_dataset(root / "data", passages=30, queries=20)
        for model in ("teacher", "student"):
            write(root / model / "config.json", model)
        tree = yaml.safe_load(TINY.read_text())
        tree |= {"output": str(self.output)}
        for name in ("teacher", "student", "data"):
            tree[name]["path"] = str(root / name)
        self.recipe = root / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(tree))
        self.told: list[str] = []

    def run(self, *overrides: str, dry_run: bool = False, **chosen: Any) -> list[str]:
        """Run the stages `chosen` as by `Choice`; the stages that ran."""
        self.told.clear()
        here: dict[str, Any] = {"tell": self.told.append, "run": self.commands, "dry_run": dry_run}
        self.tree = run_pipeline(self.recipe, overrides, choice=Choice(**chosen), **here)
        return self.commands.stages()

    def folder(self, stage: str) -> Path:
        """The folder of a stage as the recipe is."""
        tree = run_pipeline(self.recipe, dry_run=True, tell=lambda _: None)
        return next(Path(one["folder"]) for one in tree["stages"] if one["stage"] == stage)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_everything_once_then_nothing(place: Place) -> None:
    assert place.run() == STAGES
    results = place.tree["results"]
    assert [(row["model"], row["split"]) for row in results] == [
        *[("first", "dev"), ("first", "test")],
        *[("distilled", "dev"), ("distilled", "test")],
    ]
    assert place.run() == []
    assert place.tree["results"] == results
    assert {one["state"] for one in place.tree["stages"]} == {"done"}
    assert (place.output / "student" / "model.safetensors").read_text() == " distill"
    saved = json.loads((place.output / "results.json").read_text())
    assert saved["results"] == results
    assert {row["measure"] for row in saved["differences"] if row["split"] == "test"} == {"nDCG@10", "RR@10"}
    page = (place.output / "results.html").read_text()
    assert "What distillation changed" in page
    assert "| distilled | data | test | 2 | 1 |" in (place.output / "results.md").read_text()


def test_a_change_runs_its_stage_and_those_behind_it_and_keeps_what_was(place: Place) -> None:
    place.run()
    before = {path.name for path in (place.output / "stages").iterdir()}
    behind = ["distill", "report", *(name for name in EVALUATED if "first" not in name)]
    assert place.run("losses.layer.k=1") == behind
    assert before <= {path.name for path in (place.output / "stages").iterdir()}
    assert place.run() == []  # taken back: what was made before still stands
    assert place.run("pipeline.first.train.steps=5") == [name for name in STAGES if name != "negatives"]
    assert place.run("pipeline.index.factory=HNSW8") == [name for name in EVALUATED if not name.startswith("encode")]
    assert place.run("pipeline.encode.precision=bf16") == EVALUATED
    encoding = [one["commands"][0] for one in place.tree["stages"] if one["stage"].startswith("encode")]
    assert len(encoding) == 2
    assert all("--precision bf16" in command for command in encoding)


def test_what_decides_nothing_makes_nothing_anew(place: Place) -> None:
    place.run()
    free = ["train.log_every=1", "train.save_every=3", "teacher.placement=zero3", "monitor.csv=true", "data.workers=1"]
    assert place.run(*free, "pipeline.launcher=deepspeed --module lead_ds", "pipeline.encode.batch_size=8") == []
    moved = place.root / "moved"
    place.data.rename(moved)
    assert place.run(f"data.path={moved}") == []


def test_other_data_and_other_models_are_seen(place: Place) -> None:
    place.run()
    write(place.root / "teacher" / "config.json", "another")
    assert place.run() == ["teacher", "teach", "distill", "report", *(n for n in EVALUATED if "first" not in n)]
    queries = place.data / "queries.jsonl"
    queries.write_text(queries.read_text().replace("which", "what"))
    assert place.run() == STAGES


def test_a_failed_stage_is_told_and_continued(place: Place) -> None:
    place.commands.failing, place.commands.says = "distill", "warning: x\nerror: NaN loss at step 3 (lower train.lr)\n"
    with pytest.raises(RunError) as told:
        place.run()
    assert place.commands.stages() == STAGES[:7]
    line = str(told.value)
    for words in ("stage distill", "status 1", "NaN loss at step 3", "log.txt", "continues"):
        assert words in line
    assert told.value.status == 1
    place.commands.failing = ""
    place.told.clear()
    run_pipeline(place.recipe, tell=place.told.append, run=place.commands)
    assert place.commands.given[0][-1] == "--resume"
    assert place.commands.stages() == STAGES[6:]
    assert "to resume" in place.told[0]


@pytest.mark.parametrize(("status", "ends"), [(2, 2), (-9, 1), (137, 1), (-15, 143), (143, 143), (130, 130), (-2, 130)])
def test_the_status_of_a_stage_is_that_of_the_pipeline(place: Place, status: int, ends: int) -> None:
    place.commands.failing, place.commands.status = "mine", status
    with pytest.raises(RunError) as told:
        place.run()
    assert told.value.status == ends
    assert "stage negatives" in str(told.value)


def test_an_output_that_was_changed_is_set_aside(place: Place) -> None:
    place.run()
    mined = place.folder("mine") / "train.jsonl"
    mined.write_text("mine")
    assert place.run() == ["mine"]  # it came out as before: what was made from it stands
    assert (mined.parent.with_name(f"{mined.parent.name}.old-1") / "train.jsonl").read_text() == "mine"
    assert any("was changed since it was made" in line for line in place.told)


def test_an_output_that_is_lost_is_made_again(place: Place) -> None:
    place.run()
    shutil.rmtree(place.folder("distill") / "run" / "student")
    run_pipeline(place.recipe, tell=place.told.append, run=place.commands)
    assert "--resume" in place.commands.given[0]  # from its checkpoints
    assert place.commands.stages() == ["distill"]
    shutil.rmtree(place.folder("mine"))
    place.commands.salt = "other"
    after = [name for name in STAGES[2:] if "first" not in name]
    assert place.run() == after  # mined otherwise: whatever was made from it is made anew
    assert sum(path.name.endswith(".old-1") for path in (place.output / "stages").iterdir()) == len(after) - 1


def test_results_of_what_was_made_anew_since_are_not_told(place: Place) -> None:
    place.run()
    place.commands.salt = "other"
    assert place.run(again=["distill"], until="distill") == ["distill"]
    assert {row["model"] for row in place.tree["results"]} == {"first"}
    place.run()
    assert {row["model"] for row in place.tree["results"]} == {"first", "distilled"}


def test_again(place: Place) -> None:
    place.run()
    assert place.run(again=["search"]) == [name for name in STAGES if name.startswith("search")]
    assert place.run() == []


def test_a_part_of_the_stages(place: Place) -> None:
    with pytest.raises(InputError, match=r"stage mine: needs first, not complete"):
        place.run(first="mine")
    with pytest.raises(InputError, match=r"stage mien: is unknown \(this recipe has negatives, first, mine"):
        place.run(stages=["mien"])
    with pytest.raises(InputError, match="none is left"):
        place.run(first="mine", until="first")
    assert not place.output.exists()
    assert place.run(until="mine") == STAGES[:3]
    assert place.run(stages=["teacher", "student"]) == ["teacher", "student"]
    assert place.run(first="teach", until="distill") == ["teach", "distill"]
    assert place.run(stages=["encode", "index"]) == ["encode-first", "index-first", "encode", "index"]
    assert place.tree["results"] == []


def test_random_and_given_negatives_need_no_stage(place: Place) -> None:
    assert place.run("pipeline.negatives.source=random", until="first") == ["first"]
    given = place.folder("first")
    place.run("pipeline.negatives.source=given", until="first")
    folders = [path.name for path in (place.output / "stages").glob("first-*")]
    assert len(folders) == 2
    assert given.name not in folders  # that one is BM25's


def test_mining_with_a_model_that_is_there(place: Place) -> None:
    ran = place.run(
        "pipeline.first=null", f"pipeline.mine.model={place.root / 'student'}", "pipeline.models=[distilled]"
    )
    assert ran[:4] == ["mine", "teacher", "student", "teach"]


def test_a_lens_leads_to_what_reads_the_teacher(place: Place) -> None:
    lens = ["pipeline.lens={groups: 20, target: final}"]
    place.run(*lens, dry_run=True)
    commands = {one["stage"]: one["commands"][0] for one in place.tree["stages"]}
    assert " fit-lens " in commands["lens"]
    assert "--groups 20 --target final --out" in commands["lens"]
    folder = next(one["folder"] for one in place.tree["stages"] if one["stage"] == "lens")
    assert f"teacher.lens=tuned teacher.lens_path={folder}/lens" in commands["teach"]
    assert "teacher.lens" not in commands["distill"]  # the cache was made through it
    place.run(*lens, "pipeline.teach=null", dry_run=True)
    assert f"teacher.lens_path={folder}/lens" in place.tree["stages"][6]["commands"][0]
    given = ["teacher.lens=tuned", f"teacher.lens_path={place.root / 'lens'}"]
    digests = set()
    for content in ("one", "another"):
        write(place.root / "lens" / "lens.json", content)
        place.run(*given, dry_run=True)
        digests.add(next(one["digest"] for one in place.tree["stages"] if one["stage"] == "teach"))
    assert len(digests) == 2


def test_prepare(place: Place) -> None:
    prepare = "pipeline.prepare=[{kind: beir, src: x.zip, subset: y, drop_missing: true}]"
    tree = run_pipeline(place.recipe, [prepare], dry_run=True, tell=lambda _: None)
    assert tree["stages"][0]["commands"] == [f"lead-ds prepare beir x.zip {place.data} --subset y --drop-missing"]
    assert all(
        "prepare" in one["needs"] for one in tree["stages"] if one["stage"] in ("negatives", "distill", "encode")
    )


WRONG = {
    "pipeline.first.train.step=3": r"pipeline\.first\.train\.step: unknown key \(did you mean 'steps'\?\)",
    "pipeline.mine.dept=3": r"pipeline\.mine\.dept: unknown key \(did you mean 'depth'\?\)",
    "pipeline.evaluate=[{spilt: dev}]": r"unknown key \(did you mean 'split'\?\)",
    "pipeline.evaluate=[{split: dev, measures: [nDGC@10]}]": r"measure: 'nDGC@10' is unknown",
    "pipeline.evaluate=[{split: dev}, {split: dev}]": r"split 'dev' is given twice",
    "pipeline.evaluate=[{split: absent}]": r"absent\.tsv: no such file",
    "pipeline.first=null": r"pipeline: mine needs a retriever",
    "pipeline.mine.depth=1": r"pipeline\.mine\.depth: is less than skip \+ number",
    "pipeline.models=[teacher]": r"pipeline\.models: the teacher gives no vectors to index",
    "teacher.train=true": r"pipeline\.teach: reads a teacher that is there and stays as it is",
    "teacher.kind=llm_reranker": r"pipeline\.teacher: a teacher of kind llm_reranker cannot be warmed up",
    "student.kind=colbert": r"pipeline\.first: a colbert cannot search for negatives",
    "data.path=/nowhere": r"corpus\.jsonl: no such file \(stage negatives reads it",
    "teacher.path=/nowhere/model": r"/nowhere/model: no such folder",
}


@pytest.mark.parametrize("override", WRONG)
def test_wrong_input_is_told_before_anything_is_written(place: Place, override: str) -> None:
    with pytest.raises(InputError, match=WRONG[override]):
        place.run(override)
    assert not place.output.exists()
    assert place.commands.given == []


def test_a_recipe_that_is_edited_meanwhile_stops_the_pipeline(place: Place) -> None:
    commands = place.commands

    def edit(command: Sequence[str], log: Path, keep: int) -> int:
        if "distill" in command:
            place.recipe.write_text(place.recipe.read_text().replace("steps: 6", "steps: 7"))
        return commands(command, log, keep)

    with pytest.raises(InputError, match="was changed while the pipeline ran"):
        run_pipeline(place.recipe, tell=place.told.append, run=edit)
    assert commands.stages() == STAGES[:7]


def test_two_at_once_and_a_stage_that_outlives_its_pipeline(place: Place) -> None:
    sleeper = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"]
    with alone(place.output / "stages", "the first", "wait") as lock:
        with pytest.raises(InputError, match="another lead-ds pipeline"):
            place.run()
        orphan = subprocess.Popen(sleeper, pass_fds=(lock,), stdout=subprocess.PIPE)
        assert orphan.stdout is not None
        orphan.stdout.readline()
    try:
        with pytest.raises(InputError, match="a stage lives on where its pipeline was killed"):
            place.run()
    finally:
        orphan.kill()
        orphan.wait()
        orphan.stdout.close()
    assert place.run(until="first") == STAGES[:2]


SPAWN = """
import sys
from pathlib import Path
from lead_ds.pipeline.process import spawn
child = "import signal, sys, time\\n" \
    "signal.signal(signal.SIGTERM, lambda *_: (print('asked to stop', flush=True), sys.exit(143)))\\n" \
    "print('begun', flush=True)\\ntime.sleep(60)"
log = Path(sys.argv[1])
print(spawn([sys.executable, "-c", child], log, log.open("w").fileno()))
"""


def test_a_signal_reaches_the_stage_and_its_words_reach_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SPAWN, str(log)]
    parent = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert parent.stderr is not None
    assert parent.stderr.readline() == "begun\n"
    parent.send_signal(signal.SIGTERM)
    out, said = parent.communicate(timeout=600)
    assert out == "143\n"
    assert said == "asked to stop\n"
    assert log.read_text() == "begun\nasked to stop\n"
