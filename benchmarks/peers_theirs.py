"""A distillation by another library, in a process and perhaps an environment of its own: called by `benchmarks.peers`.

    python peers_theirs.py SPEC.json

SPEC names the library, the loss, the student's directory, the batches and the training's numbers. The last line printed is
what was measured, as JSON. Nothing of lead-ds is imported, so that any environment with the library will do.
"""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any


class Clock:
    """Time, losses and memory of each step."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []
        self.losses: list[float] = []
        self.before = 0.0

    def step(self) -> None:
        """A step has ended."""
        self.ends.append((time.process_time(), time.time()))

    def found(self, started: float) -> dict[str, Any]:
        """What was measured. started: when the command was given, by the system's clock."""
        pairs = [list(pair) for pair in pairwise(self.ends)]
        return {
            "first": {"processor": self.ends[0][0], "wall": self.ends[0][1] - started},
            "processor": [after[0] - before[0] for before, after in pairs],
            "wall": [after[1] - before[1] for before, after in pairs],
            "peak": status("VmHWM"),
            "before": self.before,
            "losses": self.losses,
        }


def status(field: str) -> float:
    """MiB of this process: VmRSS is resident now, VmHWM at most since it began."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def columns(path: str, loss: str) -> dict[str, list[Any]]:
    """The batches as columns: query, positive, negatives, label."""
    rows = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
    found: dict[str, list[Any]] = {"query": [row["query"] for row in rows]}
    for place in range(len(rows[0]["passages"])):
        found["positive" if place == 0 else f"negative_{place}"] = [row["passages"][place] for row in rows]
    if loss != "labels":
        scale = 0.05 if loss == "margin" else 1.0
        found["label"] = [row["label"] for row in rows]
        if loss == "margin":
            found["label"] = [[(row[0] - x) * scale for x in row[1:]] for row in found["label"]]
    return found


def train(spec: dict[str, Any], clock: Clock) -> None:
    """A dual encoder, by sentence-transformers' trainer."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from sentence_transformers.sentence_transformer import losses

    model = SentenceTransformer(spec["student"], device="cpu")
    model.max_seq_length = spec["length"]
    known = {
        "kl": lambda: losses.DistillKLDivLoss(model, student_temperature=0.05, teacher_temperature=1.0),
        "margin": lambda: losses.MarginMSELoss(model),
        "embed": lambda: losses.EmbedDistillLoss(model, distance_metric="cosine"),
        "labels": lambda: losses.MultipleNegativesRankingLoss(model, scale=20.0),
    }
    args = SentenceTransformerTrainingArguments(**settings(spec), batch_sampler=in_order(DefaultBatchSampler))
    data = Dataset.from_dict(columns(spec["batches"], spec["loss"]))
    run(SentenceTransformerTrainer, model, args, data, known[spec["loss"]](), clock)
    model.save(spec["out"])


def in_order(base: Any) -> Any:
    """A batch sampler that keeps the order of the rows, as all libraries here read them."""

    class InOrder(base):  # type: ignore[misc]  # the base is known when it runs
        def __init__(self, dataset: Any, *given: Any, **named: Any) -> None:
            super().__init__(dataset, *given, **named)
            self.dataset = dataset

        def __iter__(self) -> Any:
            rows = list(range(len(self.dataset)))
            return (rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size))

    return InOrder


def settings(spec: dict[str, Any]) -> dict[str, Any]:
    """What transformers' trainer is set to."""
    return {
        "output_dir": spec["out"] + "-run",
        "num_train_epochs": 1,
        "per_device_train_batch_size": spec["batch"],
        "learning_rate": spec["lr"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "optim": "adamw_torch",
        "bf16": spec["precision"] == "bf16",
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": 888,
    }


def run(trainer: Any, model: Any, args: Any, data: Any, loss: Any, clock: Clock, **more: Any) -> None:
    """Train, under the clock."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.step()

    loss.register_forward_hook(lambda module, given, value: clock.losses.append(float(value.detach())))
    made = trainer(model=model, args=args, train_dataset=data, loss=loss, callbacks=[Steps()], **more)
    clock.before = status("VmRSS")
    made.train()


def make_colbert(spec: dict[str, Any]) -> None:
    """A ColBERT of the student's transformer, with a projection of random weights, as PyLate saves it."""
    import torch
    from pylate import models

    torch.manual_seed(888)
    lengths = {"query_length": 32, "document_length": spec["length"]}
    models.ColBERT(spec["student"], embedding_size=128, device="cpu", **lengths).save(spec["out"])


def train_colbert(spec: dict[str, Any], clock: Clock) -> None:
    """A ColBERT, by PyLate."""
    from datasets import Dataset
    from pylate import losses, models, utils
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sampler import DefaultBatchSampler

    model = models.ColBERT(spec["student"], device="cpu")
    rows = [json.loads(line) for line in Path(spec["batches"]).read_text("utf-8").splitlines()]
    data = Dataset.from_dict(
        {
            "query": [row["query"] for row in rows],
            "documents": [row["passages"] for row in rows],
            "scores": [row["label"] for row in rows],
        }
    )
    args = SentenceTransformerTrainingArguments(**settings(spec), batch_sampler=in_order(DefaultBatchSampler))
    loss = losses.Distillation(model, normalize_scores=False)
    run(SentenceTransformerTrainer, model, args, data, loss, clock, data_collator=utils.ColBERTCollator(model.tokenize))
    model.save(spec["out"])


def train_tevatron(spec: dict[str, Any], clock: Clock) -> None:
    """A dual encoder on labels, by Tevatron's trainer, as its train command sets it up."""
    from datasets import Dataset
    from tevatron.arguments import DataArguments, DenseTrainingArguments, ModelArguments
    from tevatron.data import QPCollator, TrainDataset
    from tevatron.modeling import DenseModel
    from tevatron.trainer import DenseTrainer
    from torch.utils.data import SequentialSampler
    from transformers import BertTokenizer, TrainerCallback

    class InOrder(DenseTrainer):  # type: ignore[misc]  # the base is known when it runs
        def _get_train_sampler(self) -> Any:
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, *given: Any, **named: Any) -> Any:
            loss = super().compute_loss(*given, **named)
            clock.losses.append(float(loss.detach()))
            return loss

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.step()

    # One that takes tokens' numbers, which the fast ones do not; the directory is of a later transformers.
    vocabulary = json.loads((Path(spec["student"]) / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    Path(spec["out"]).mkdir(parents=True)
    words = Path(spec["out"]) / "vocab.txt"
    words.write_text("".join(f"{word}\n" for word in sorted(vocabulary, key=vocabulary.get)), encoding="utf-8")
    tokenizer = BertTokenizer(str(words))
    rows = [json.loads(line) for line in Path(spec["batches"]).read_text("utf-8").splitlines()]
    lengths = {"q_max_len": spec["query_length"], "p_max_len": spec["length"]}
    order = {"positive_passage_no_shuffle": True, "negative_passage_no_shuffle": True}
    data_args = DataArguments(train_n_passages=len(rows[0]["passages"]), **lengths, **order)
    model_args = ModelArguments(model_name_or_path=spec["student"])
    args = DenseTrainingArguments(**settings(spec), warmup_ratio=0.0, remove_unused_columns=False)

    def tokens(text: str, length: int) -> list[int]:  # as its preprocessor does
        ids = tokenizer.encode(text, add_special_tokens=False, max_length=length, truncation=True)
        return [int(i) for i in ids]

    groups = [
        {
            "query": tokens(row["query"], lengths["q_max_len"]),
            "positives": [tokens(row["passages"][0], lengths["p_max_len"])],
            "negatives": [tokens(text, lengths["p_max_len"]) for text in row["passages"][1:]],
        }
        for row in rows
    ]
    data = TrainDataset(data_args, Dataset.from_list(groups), tokenizer)
    model = DenseModel.build(model_args, data_args, args)
    collator = QPCollator(tokenizer, max_p_len=lengths["p_max_len"], max_q_len=lengths["q_max_len"])
    trainer = InOrder(model=model, args=args, train_dataset=data, data_collator=collator, callbacks=[Steps()])
    data.trainer = trainer
    clock.before = status("VmRSS")
    trainer.train()
    model.lm_q.save_pretrained(spec["out"])
    tokenizer.save_pretrained(spec["out"])


def encode(spec: dict[str, Any], clock: Clock) -> None:
    """Every text once, by sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(spec["student"], device="cpu")
    model.max_seq_length = spec["length"]
    texts = [json.loads(line)["text"] for line in Path(spec["batches"]).read_text("utf-8").splitlines()]
    clock.before = status("VmRSS")
    clock.step()
    model.encode(texts)
    clock.step()


def main() -> None:
    """Run what the specification asks for."""
    import torch

    spec = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    clock = Clock()
    if spec["library"] == "make-colbert":
        make_colbert(spec)
        print("{}")
        return
    ways = {"sentence-transformers": train, "pylate": train_colbert, "tevatron": train_tevatron, "encode": encode}
    ways[spec["library"]](spec, clock)
    print(json.dumps(clock.found(float(os.environ["PEERS_STARTED"]))))


if __name__ == "__main__":
    main()
