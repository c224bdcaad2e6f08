"""What layer distillation brings, measured: the same student trained in many ways, tested on held-out collections.

    python -m benchmarks.quality build  --data DATA --work WORK
    python -m benchmarks.quality texts  --data DATA --work WORK
    python -m benchmarks.quality mine   --models MODELS --work WORK [--rescore]
    python -m benchmarks.quality teach  --models MODELS --work WORK [--teacher ce de mp cb]
    python -m benchmarks.quality run    --models MODELS --work WORK [--arms lead response] [--seeds 1 2 3]
    python -m benchmarks.quality report --work WORK --out benchmarks/results/quality.json
    python -m benchmarks.quality layers --work WORK --out benchmarks/results/quality-layers.json

`mine`, before `teach`, puts negatives that the student itself finds in the place of BM25's. With --rescore the cross-encoder
scores them, and those that it ranks with the positives are left out.
`run` and `report` take `--split dev`: settings are chosen on dev queries, and test queries are run once.

DATA holds collections in BEIR's layout, one folder each (squadshifts, medquad, tldr, scifact, cranfield, vaswani).
MODELS holds minilm-l3 (the student), reranker-l12 (cross-encoder), bge-small and mpnet-base (dual encoders) and colbert, which
`teach` warms up. Every command goes on where it was ended: what is in WORK is not made again. Sizes are options of `build` and
`run`.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality_arms import (
    ARMS,
    BY_NAME,
    DE_LAYERS,
    LENS_TEMPERATURE,
    MODELS,
    STUDENT,
    TEACHERS,
    Arm,
    cache_of,
    settings,
)
from benchmarks.quality_data import (
    OTHERS,
    TRAINED_ON,
    Size,
    build_test,
    build_texts,
    build_training,
    mine_by,
    without_dropout,
)
from lead_ds.config import Config, StudentConfig
from lead_ds.data.collections.dataset import Dataset
from lead_ds.errors import LeadError
from lead_ds.io.files import read_json, write_json
from lead_ds.retrieval.evaluate import Task, evaluate_model, open_encoder
from lead_ds.settings.data import DataConfig

MEASURES = ("nDCG@10", "RR@10", "R@100")
SETTINGS = "settings.json"
DENSE = {"de": DE_LAYERS, "mp": "final"}  # which of a dual encoder's layers `teach` keeps the vectors of
UNTRAINED = ("start", "teacher-de", "teacher-mp")


def build(args: argparse.Namespace) -> None:
    """The collections."""
    size = Size(args.train, args.dev, args.passages, args.negatives)
    build_training(args.work / "train", {name: args.data / name for name in TRAINED_ON}, size)
    for name in (*TRAINED_ON, *OTHERS):
        build_test(args.work / "test" / name, name, args.data / name, size)
    for name in TRAINED_ON:
        build_test(args.work / "dev" / name, name, args.data / name, size, "dev")
    write_json(args.work / SETTINGS, {"size": vars(size)})


def texts(args: argparse.Namespace) -> None:
    """Texts alone of the training sets, for `quality_queries.yaml`."""
    build_texts(args.work / "texts" / "texts.txt", {name: args.data / name for name in TRAINED_ON})


def mine(args: argparse.Namespace) -> None:
    """Hard negatives by the student as it is, in the place of BM25's."""
    told = read_json(args.work / SETTINGS, "call `build` first")
    models = models_of(args)
    reranker = models["ce"] if args.rescore else None
    mine_by(models["student"], args.work / "train", told["size"]["negatives"], reranker)
    write_json(args.work / SETTINGS, {**told, "negatives by": "student, cross-encoder" if args.rescore else "student"})


def teach(args: argparse.Namespace) -> None:
    """What teachers say of the training groups: relevance by every layer, by own heads and lenses; a dual encoder's vectors."""
    from lead_ds.teachers.teach import teach as write_cache

    models = models_of(args)
    for name in args.teacher:
        if name == "cb" and not models["cb"].exists():
            warm_up_colbert(args, models)
        for lens in (False, True) if name == "ce" else (False,):
            arm = Arm("teach", "", name, source="vectors" if name in DENSE else "relevance", lens=lens)
            tree = settings(replace(arm, source="model"), args.work, models, seed=888, **sizes_of(args))
            tree["teacher"]["batch_size"] = 64
            if lens:
                tree["losses"]["layer"]["teacher_temperature"] = LENS_TEMPERATURE
                fit_lens(Config.model_validate(tree), args.work / "lens")
                tree["teacher"] |= {"lens": "tuned", "lens_path": str(args.work / "lens")}
            vectors = DENSE.get(name)
            write_cache(Config.model_validate(tree), cache_of(arm, args.work), vectors=vectors)


def run(args: argparse.Namespace) -> None:
    """Train and test every arm with every seed."""
    models = models_of(args)
    for name in UNTRAINED:
        if name in args.arms:
            path = models["student" if name == "start" else name.removeprefix("teacher-")]
            student = {**settings_student(name), "path": str(path)}
            keep(args, name, 0, partial(untrained, student))
    from lead_ds.engine.distributed.ranks import ranks

    with ranks():  # one process group for all runs
        for seed, name in ((seed, name) for seed in args.seeds for name in args.arms if name in BY_NAME):
            keep(args, name, seed, partial(train, args, models, BY_NAME[name], seed))


def untrained(student: dict[str, Any]) -> tuple[StudentConfig, dict[str, Any]]:
    """A model as it is."""
    return StudentConfig.model_validate(student), {}


def settings_student(name: str) -> dict[str, Any]:
    """How a model that is not trained here is read."""
    if name == "start":
        return dict(STUDENT)
    return {**TEACHERS[name.removeprefix("teacher-")], "query_length": 64}


def train(args: argparse.Namespace, models: dict[str, Path], arm: Arm, seed: int) -> tuple[Any, dict[str, Any]]:
    """One run: the student's folder, and what is worth keeping of it."""
    from lead_ds.engine.training.distill import distill

    tree = settings(arm, args.work, models, seed=seed, **sizes_of(args))
    for override in args.set or []:
        key, _, value = override.partition("=")
        at = tree
        *parents, last = key.split(".")
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = json.loads(value)
    tree["output"] = str(args.work / "runs" / f"{arm.name}{args.tag}-{seed}")
    config = Config.model_validate(tree)
    output = Path(config.output)
    started = time.perf_counter()
    student = distill(config, resume=(output / "config.yaml").exists(), quiet=True)
    seconds = time.perf_counter() - started
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]
    return student, {"seconds": seconds, "lr": config.train.lr, "last": rows[-1]}


def keep(args: argparse.Namespace, name: str, seed: int, make: Any) -> None:
    """Test what `make` makes, unless an earlier call did."""
    path = scores_of(args) / f"{name}{args.tag}-{seed}.json"
    tests = [*TRAINED_ON, *OTHERS] if name in args.everywhere and args.split == "test" else [*TRAINED_ON]
    known = read_json(path, "delete it")["scores"] if path.exists() else {}
    missing = [test for test in tests if test not in known]
    if not missing:
        return
    model, told = make()
    scorer, encoder = open_encoder(model)
    if isinstance(model, StudentConfig):
        encoder = encoder.serving()
    scorer = scorer.to(getattr(torch, args.dtype))
    started = time.perf_counter()
    for test in missing:
        dataset = Dataset.open(args.work / args.split / test)
        scores = evaluate_model(scorer, encoder, Task(dataset, args.split, MEASURES), quiet=True)
        known[test] = scores.per_query
    facts = {"arm": name, "seed": seed, "steps": args.steps, "batch": args.batch, "lr": args.lr, "set": args.set or []}
    facts["negatives by"] = read_json(args.work / SETTINGS, "call `build` first").get("negatives by", "bm25")
    facts |= {"tested_in": args.dtype, **told, "test_seconds": time.perf_counter() - started, **machine()}
    write_json(path, {**facts, "scores": known})
    means = {test: round(mean(known[test]["nDCG@10"]), 4) for test in known}
    print(f"{name}{args.tag} seed {seed}: {means}  {told.get('seconds', 0):.0f} s", flush=True)


def scores_of(args: argparse.Namespace) -> Path:
    """Where the scores of a split are."""
    folder: Path = args.work / ("scores" if args.split == "test" else f"scores-{args.split}")
    return folder


def mean(values: dict[str, float]) -> float:
    """Of a measure over queries."""
    return sum(values.values()) / len(values)


def machine() -> dict[str, Any]:
    """Where and when."""
    import lead_ds

    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)",
        "versions": {"torch": torch.__version__, "lead-ds": lead_ds.__version__, "python": platform.python_version()},
    }


def sizes_of(args: argparse.Namespace) -> dict[str, Any]:
    """How large a run is: what the command line sets, and the negatives that `build` mined."""
    size = read_json(args.work / SETTINGS, "call `build` first")["size"]
    return {"negatives": size["negatives"], "steps": args.steps, "batch": args.batch, "lr": args.lr}


def models_of(args: argparse.Namespace) -> dict[str, Path]:
    """Where the models are."""
    named = {key: args.models / name for key, name in MODELS.items()}
    student = without_dropout(named["student"], args.work / "student")
    cut = without_dropout(named["de"], args.work / "cut")
    return {**named, "student": student, "cut": cut, "cb": args.work / "colbert" / "model"}


def warm_up_colbert(args: argparse.Namespace, models: dict[str, Path]) -> None:
    """A ColBERT out of the dual encoder, on the training groups' labels."""
    from lead_ds.engine.training.warmup import warmup

    tree = settings(BY_NAME["labels"], args.work, models, seed=888, **sizes_of(args))
    tree["student"] = {**TEACHERS["cb"], "path": str(models["de"]), "token_dim": 128, "normalize": True}
    tree["losses"]["contrastive"]["temperature"] = 1.0
    tree["output"] = str(args.work / "colbert")
    warmup(Config.model_validate(tree), resume=(args.work / "colbert" / "config.yaml").exists())


def fit_lens(config: Config, folder: Path) -> None:
    """The cross-encoder's tuned lens, fitted on the training groups."""
    from lead_ds.teachers.fit_lens import Fit
    from lead_ds.teachers.fit_lens import fit_lens as fit

    if not (folder / "lens.json").exists():
        fit(config, folder, Fit(groups=100_000))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    every = argparse.ArgumentParser(add_help=False)
    every.add_argument("--work", type=Path, required=True, help="where everything goes")
    every.add_argument("--split", choices=["test", "dev"], default="test", help="whose queries are run")
    models = argparse.ArgumentParser(add_help=False)
    models.add_argument("--models", type=Path, required=True, help="folder of models")
    steps = argparse.ArgumentParser(add_help=False)
    steps.add_argument("--steps", type=int, default=100, help="of a run")
    steps.add_argument("--batch", type=int, default=16, help="queries of a step")
    steps.add_argument("--lr", type=float, default=5e-5, help="highest learning rate, where an arm has none of its own")
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--data", type=Path, required=True, help="folder of collections")
    one = commands.add_parser("build", parents=[every, data], help="draw the collections")
    one.add_argument("--train", type=int, default=534, help="training queries of each set")
    one.add_argument("--dev", type=int, default=200, help="dev queries of each set")
    one.add_argument("--passages", type=int, default=2500, help="passages of a test corpus; 0: all")
    one.add_argument("--negatives", type=int, default=4, help="hard negatives of a query")
    one.set_defaults(call=build)
    one = commands.add_parser("texts", parents=[every, data], help="training queries and sentences, without judgements")
    one.set_defaults(call=texts)
    one = commands.add_parser("mine", parents=[every, models], help="negatives by the student in the place of BM25's")
    one.add_argument("--rescore", action="store_true", help="and scored again by the cross-encoder")
    one.set_defaults(call=mine)
    one = commands.add_parser("teach", parents=[every, models, steps], help="run the teachers once")
    one.add_argument("--teacher", nargs="+", default=["ce", "de", "cb"], choices=list(TEACHERS))
    one.set_defaults(call=teach)
    one = commands.add_parser("run", parents=[every, models, steps], help="train and test")
    names = [*UNTRAINED, *(arm.name for arm in ARMS)]
    one.add_argument("--arms", nargs="+", default=names, choices=names)
    one.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    one.add_argument(
        "--everywhere", nargs="*", default=names, help="arms that are also tested on the sets not trained on"
    )
    one.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the tests")
    one.add_argument("--set", nargs="*", help="further settings, as KEY=JSON, for trials under another --tag")
    one.add_argument("--tag", default="", help="added to the names of results")
    one.set_defaults(call=run)
    one = commands.add_parser("layers", parents=[every], help="what the dual encoder's layers know, by temperature")
    one.add_argument("--batch", type=int, default=16, help="queries that share their passages")
    one.add_argument("--out", type=Path, required=True, help="JSON")
    one.set_defaults(call=layers)
    one = commands.add_parser("report", parents=[every], help="tables of means, intervals and tests")
    one.add_argument("--out", type=Path, required=True, help="JSON; a page of the same name with .md beside it")
    one.add_argument("--keep", action="store_true", help="keep rows of OUT whose arms WORK has no runs of")
    one.set_defaults(call=report)
    args = parser.parse_args(arguments)
    try:
        args.call(args)
    except LeadError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.status) from None


def layers(args: argparse.Namespace) -> None:
    """What `teach` kept of the dual encoder, layer by layer."""
    from benchmarks.quality_layers import layers_of, markdown

    negatives = read_json(args.work / SETTINGS, "call `build` first")["size"]["negatives"]
    data = DataConfig(path=str(args.work / "train"), negatives=negatives)
    rows = layers_of(data, args.work / "vectors-de", args.batch)
    write_json(args.out, {"batch": args.batch, **machine(), "layers": rows})
    print(markdown(rows))


def report(args: argparse.Namespace) -> None:
    """Write the tables."""
    from benchmarks.quality_report import write

    print(write(scores_of(args), args.out, args.keep))


if __name__ == "__main__":
    main()
