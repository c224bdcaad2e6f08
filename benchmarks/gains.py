"""What each gain is worth on real texts and models, against the same run without it, in turns (A B A B ...), medians.

    python -m benchmarks.gains --data DATA --models MODELS [--only GAIN ...] [--rounds 5]

DATA holds training groups in the canonical layout, or qrels/train.tsv; MODELS the Hugging Face directories minilm-l3,
minilm-l6 and reranker-l12. One process, float32 on CPU; processor time, so that a busy machine may be measured on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.throughput_presets import bert, write_data, write_model
from lead_ds.config import Config
from lead_ds.data.batches import Batches, Window
from lead_ds.data.groups.open import open_groups
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.engine.training.distill import open_batches
from lead_ds.models.load import load_student, load_text
from lead_ds.models.scorer import Scorer
from lead_ds.plan.activations import Ledger
from lead_ds.relevance import Features, ScoreFeatures, VectorFeatures
from lead_ds.teachers.frozen import FrozenTeacher, build_teacher, depth_needed
from lead_ds.teachers.teacher import Lesson

HERE = Ranks(0, 0, 1, torch.device("cpu"))
Timed = Callable[[int], Any]


def config_of(arguments: argparse.Namespace, name: str = "minilm-l6", /, **sections: Any) -> Config:
    """A run over the data, with a teacher of 256 and a student of 128 tokens."""
    models, data = Path(arguments.models), Path(arguments.data)
    kind = "cross_encoder" if "reranker" in name else "dual_encoder"
    lengths = {"max_length": 256} if kind == "cross_encoder" else {"query_length": 32, "passage_length": 256}
    tree: dict[str, Any] = {
        "teacher": {"kind": kind, "path": str(models / name), "dtype": "fp32", **lengths},
        "student": {"path": str(models / "minilm-l3"), "query_length": 32, "passage_length": 128},
        "data": {"path": str(data), "negatives": 7},
        "train": {"batch_size": arguments.batch_size},
    }
    tree["data"]["train"] = "train.jsonl" if (data / "train.jsonl").exists() else "qrels/train.tsv"
    for key, section in sections.items():
        tree[key] = {**tree.get(key, {}), **section}
    return Config.model_validate(tree)


def batches_of(config: Config) -> Batches:
    """Its windows."""
    return open_batches(config, open_groups(config.data), load_text(config.student), HERE)


def in_turns(cases: Mapping[str, Timed], rounds: int) -> dict[str, float]:
    """Median seconds of this process on its processors, of each case, all of them once per round; the first warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, run in cases.items():
            start = time.process_time()
            run(turn)
            if turn:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def tell(what: str, seconds: dict[str, float], **more: dict[str, Any]) -> None:
    """One JSON line per case, with how many times faster than the first it is."""
    first = next(iter(seconds.values()))
    for name, value in seconds.items():
        row = {"gain": what, "case": name, "seconds": round(value, 4), "times faster": round(first / value, 3)}
        row |= {key: values[name] for key, values in more.items()}
        print(json.dumps(row), flush=True)


def tokens_run(window: Window) -> int:
    """Tokens, padding included, that the teacher runs over."""
    total = 0
    for batch in window.teachers[0]:
        tables = batch.passes.tokens if batch.passes else batch.tables
        total += sum(table["input_ids"].numel() for table in tables)
    return total


def padding(arguments: argparse.Namespace) -> None:
    """Tokens, padding included, that a model runs over in a window of 32 queries; of real tokens, and the forwards."""
    for name in ("minilm-l6", "reranker-l12"):
        for n in (None, 1, 2, 3, 4, "packed"):
            config = config_of(arguments, name, teacher={"passes": n}, train={"batch_size": 32})
            windows = [batches_of(config).window(turn) for turn in range(arguments.rounds)]
            tables = [table for w in windows for table in w.teachers[0][0].tables]
            real = sum(int(table["attention_mask"].sum()) for table in tables)
            run = sum(tokens_run(window) for window in windows)
            row = {
                "gain": f"padding of teacher.passes, {name}",
                "case": str(n),
                "tokens run / real": round(run / real, 3),
            }
            print(json.dumps(row), flush=True)


def passes(arguments: argparse.Namespace) -> None:
    """A teacher's window in length-sorted passes; the largest difference from the unsorted features."""
    for name in ("minilm-l6", "reranker-l12"):
        settings = {str(n): config_of(arguments, name, teacher={"passes": n}) for n in (None, 1, 2, 4)}
        teacher = build_teacher(Lesson.of(next(iter(settings.values()))), HERE)
        windows = {n: [batches_of(c).window(t) for t in range(arguments.rounds + 1)] for n, c in settings.items()}

        def run(n: str, turn: int, teacher: FrozenTeacher = teacher, windows: Any = windows) -> Any:
            return teacher.window(windows[n][turn].teachers[0], [1, 3])

        plain = [tensor for x in (run("None", 0).final, run("None", 0).layers) for tensor in tensors(x)]
        difference = {}
        for n in settings:
            found = [tensor for x in (run(n, 0).final, run(n, 0).layers) for tensor in tensors(x)]
            difference[n] = max(
                (a - b).abs().max().item() / a.abs().max().item() for a, b in zip(plain, found, strict=True)
            )
        seconds = in_turns({n: partial(run, n) for n in settings}, arguments.rounds)
        counts = {n: statistics.mean(tokens_run(w) for w in found) for n, found in windows.items()}
        tell(f"teacher.passes, {name}", seconds, tokens=counts, relative_difference=difference)


def packed(arguments: argparse.Namespace) -> None:
    """A teacher's window in packed rows; texts as long as MS MARCO's, weights at random, a layer or two of each shape."""
    decoder: dict[str, Any] = {"model_type": "mistral", "sliding_window": None}
    narrow = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    wide = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
    shapes = {
        "BERT 384 wide": bert(2, 384, 12),
        "decoder 576 wide": {**decoder, **narrow, "num_hidden_layers": 2},
        "decoder 2048 wide": {**decoder, **wide, "num_hidden_layers": 1},
    }
    for name, shape in shapes.items():
        with TemporaryDirectory() as folder:
            path, ways = Path(folder), (None, 4, "packed")
            write_model(path / "model", shape, "dual_encoder")
            write_data(path / "data", arguments.batch_size * (arguments.rounds + 1), 8, 32, 128, "natural")
            model: dict[str, Any] = {"path": str(path / "model"), "weights": "random", "dtype": "fp32"}
            model |= {"query_length": 32, "passage_length": 128}
            configs = {
                str(n): Config.model_validate(
                    {
                        "teacher": {**model, "kind": "dual_encoder", "passes": n},
                        "student": model,
                        "data": {"path": str(path / "data"), "negatives": 7},
                        "train": {"batch_size": arguments.batch_size},
                    }
                )
                for n in ways
            }
            teacher = build_teacher(Lesson.of(next(iter(configs.values()))), HERE)
            windows = {n: [batches_of(c).window(t) for t in range(arguments.rounds + 1)] for n, c in configs.items()}
            told = {n: teacher.window(found[0].teachers[0], [0]) for n, found in windows.items()}
            plain = [*tensors(told["None"].final), *tensors(told["None"].layers)]
            difference = {
                n: max(
                    (a - b).abs().max().item() / a.abs().max().item()
                    for a, b in zip(plain, [*tensors(one.final), *tensors(one.layers)], strict=True)
                )
                for n, one in told.items()
            }
            run = {n: [tokens_run(w) for w in found] for n, found in windows.items()}
            real = sum(
                int(table["attention_mask"].sum()) for w in windows["None"] for b in w.teachers[0] for table in b.tables
            )

            def read(n: str, turn: int, teacher: FrozenTeacher = teacher, windows: Any = windows) -> None:
                teacher.window(windows[n][turn].teachers[0], [0])

            tell(
                f"teacher.passes: packed, {name}, natural lengths",
                in_turns({n: partial(read, n) for n in windows}, arguments.rounds),
                relative_difference=difference,
                **{"tokens run / real": {n: round(sum(counts) / real, 3) for n, counts in run.items()}},
            )


def grad_cache(arguments: argparse.Namespace) -> None:
    """A student's forward and backward: seconds, and bytes of tensors alive at most."""
    b = arguments.batch_size
    sections: dict[str, dict[str, Any]] = {
        "plain": {},
        "student.passes 2": {"student": {"passes": 2}},
        "gradient_checkpointing": {},
        **{f"grad_cache {n}": {"train": {"batch_size": b, "grad_cache": n}} for n in {max(1, b // 4), max(1, b // 16)}},
    }
    cases, peaks, students = {}, {}, {}
    for name, section in sections.items():
        config = config_of(arguments, **section)
        student = load_student(config.student, torch.float32)
        student.recompute = config.train.grad_cache is not None
        if name == "gradient_checkpointing":
            student.gradient_checkpointing_enable()
        found = [batches_of(config).window(turn) for turn in range(arguments.rounds + 1)]
        students[name] = student

        def run(turn: int, student: Scorer = student, found: list[Window] = found) -> None:
            output = student(found[turn].student[0], layers=[0, 2])
            student.zero_grad()
            loss = sum(features.relevance().logits.logsumexp(-1).mean() for features in (output.final, output.layers))
            loss.backward()

        cases[name] = run
        ledger = Ledger({x.untyped_storage()._cdata for x in student.parameters()})
        with ledger:
            run(0)
        peaks[name] = ledger.peak >> 20
    tell("train.grad_cache, minilm-l3", in_turns(cases, arguments.rounds), peak_mib=peaks)


def truncate(arguments: argparse.Namespace) -> None:
    """A teacher of which layers 1 and 3 are read, whole and cut."""
    layer = {"select": "given", "teacher_layers": [1, 3], "student_layers": [0, 2]}
    config = config_of(arguments, "reranker-l12", losses={"response": {"weight": 0.0}, "layer": layer})
    windows = [batches_of(config).window(turn) for turn in range(arguments.rounds + 1)]
    assert config.teacher is not None
    lesson, depth = Lesson.of(config), depth_needed(config.teacher, config.losses)
    teachers = {"whole": build_teacher(lesson, HERE), "truncated": build_teacher(lesson, HERE, depth)}
    whole, cut = (tensors(t.window(windows[0].teachers[0], [1, 3]).layers)[0] for t in teachers.values())
    same = dict.fromkeys(teachers, torch.equal(whole, cut))

    def read(name: str, turn: int) -> None:
        teachers[name].window(windows[turn].teachers[0], [1, 3])

    megabytes = {n: t.parameter_bytes()[0] >> 20 for n, t in teachers.items()}
    tell(
        "teacher.truncate, reranker-l12, layers 1 and 3",
        in_turns({n: partial(read, n) for n in teachers}, arguments.rounds),
        bit_equal=same,
        mib=megabytes,
    )


def tokens(arguments: argparse.Namespace) -> None:
    """Preparing a window: read and tokenise its texts, or read their tokens."""
    for name in ("minilm-l6", "reranker-l12"):
        read = {
            str(cache): batches_of(config_of(arguments, name, data={"token_cache": cache}))
            for cache in (False, arguments.tokens)
        }
        cases = {n: b.window for n, b in read.items()}
        tell(f"data.token_cache, teacher {name}", in_turns(cases, arguments.rounds * 4))


def tensors(features: Features | None) -> list[torch.Tensor]:
    """Features as tensors."""
    assert features is not None
    if isinstance(features, ScoreFeatures):
        return [features.s_KQN]
    assert isinstance(features, VectorFeatures)
    return [features.q_KQD, features.p_KPD]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gains = {gain.__name__: gain for gain in (padding, passes, packed, grad_cache, truncate, tokens)}
    parser.add_argument("--data", required=True)
    parser.add_argument("--models", required=True)
    parser.add_argument("--tokens", default="runs/tokens", help="where kept tokens go")
    parser.add_argument("--only", nargs="*", choices=list(gains), default=list(gains))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    for name in arguments.only:
        gains[name](arguments)


if __name__ == "__main__":
    main()
