"""A run as an object: what `lead-ds distill` and `lead-ds warmup` build and start, and what Python does."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from lead_ds.config import Config
from lead_ds.data.groups.rows import RowGroups
from lead_ds.engine.distributed.agreement import agreed
from lead_ds.engine.distributed.ranks import ranks
from lead_ds.engine.records.callbacks import Callback
from lead_ds.engine.training.distill import train
from lead_ds.engine.training.evaluation import Evaluator
from lead_ds.engine.training.given import Given
from lead_ds.errors import InputError
from lead_ds.face.compose import ROWS, ModelLike, compose, module_of, modules_of
from lead_ds.face.model import Model, load
from lead_ds.models.own import OwnEncoder, load_weights
from lead_ds.settings.parse import parse_section
from lead_ds.settings.train import EvaluationConfig


class Distiller:
    """A run: a teacher, a student, training groups, losses and settings.

    teacher, student: a model of `load`, a path or hub name, or its section ({"path": ..., "kind": ..., ...}). Or a
    torch module of your own, or {"module": ..., "scale": "cosine"}. Its `tokenize(texts, side)` gives a dictionary of
    tensors with a row for each text; its `forward(tokens)` gives vectors [B, D], or these and a list of its layers'
    vectors. Without a teacher the student learns from labels; a list of teachers is of several, whose sections may have a
    weight and the names of the losses that each feeds. data: a folder or file of groups, a `datasets.Dataset`,
    or rows [{"query", "positives", "negatives", "scores"?}] of texts. The columns of sentence-transformers and
    FlagEmbedding are read, too.
    losses: those to train by, such as [losses.Response(weight=3), losses.Layer(select="last", k=3), MyLoss], or by name,
    {"response": {"weight": 3}}; weight 1 where none is given. None: the configuration's defaults.
    callbacks: called as the run goes on; they can end it.
    settings: what a configuration file holds, as sections (`evaluation={"split": "dev"}`) or, of `train` and `data`,
    alone (`steps=1000`, `lr=1e-5`, `negatives=7`). `output`, `seed` and `kernels` are settings, too.

    Under a launcher every process makes and trains the same. Raises InputError for what cannot be, before any training.

    >>> from lead_ds import losses
    >>> things = ["octopus", "glacier", "violin", "volcano", "honeybee", "lighthouse", "compass", "bread"]
    >>> run = Distiller(
    ...     teacher=load(cross_encoder, max_length=64),
    ...     student=dual_encoder,
    ...     data=[{"query": f"what is a {thing}", "positives": [f"a {thing} is"]} for thing in things],
    ...     losses=[losses.Response(weight=3)],
    ...     steps=2,
    ...     batch_size=4,
    ...     negatives=2,
    ...     output=folder / "distiller",
    ... ).train(quiet=True)
    >>> run.student.encode(["a text"]).shape
    torch.Size([1, 16])
    """

    def __init__(
        self,
        teacher: ModelLike | Sequence[ModelLike] | None = None,
        *,
        student: ModelLike,
        data: Any,
        losses: Mapping[str, Any] | Sequence[Any] | None = None,
        callbacks: Sequence[Callback] = (),
        **settings: Any,
    ) -> None:
        config = compose(teacher, student, data, losses, settings)
        groups = RowGroups.of(data, config.data.negatives) if config.data.path == ROWS else None
        given = Given(groups, student=module_of(student), teachers=modules_of(teacher), callbacks=callbacks)
        self._set(config, given, "student")

    @classmethod
    def of(cls, config: Config, *, callbacks: Sequence[Callback] = (), product: str = "student") -> Distiller:
        """The run of a configuration. product: the folder in its output that the model goes to."""
        run = cls.__new__(cls)
        run._set(config, Given(callbacks=callbacks), product)
        return run

    def _set(self, config: Config, given: Given, product: str) -> None:
        for callback in given.callbacks:
            if not isinstance(callback, Callback):
                what = f"a {type(callback).__name__} is not a Callback"
                raise InputError("callbacks", what, "make it a subclass of lead_ds.Callback, and give an instance")
        self.config, self._given, self._product = config, given, product
        self._student: Model | None = None

    @property
    def output(self) -> Path:
        """The folder of the run."""
        return Path(self.config.output)

    def train(
        self,
        resume: bool = False,
        *,
        accept_changed: Sequence[str] = (),
        quiet: bool = False,
        command: Sequence[str] = (),
    ) -> Distiller:
        """Train to the end, or with `resume` continue from the last checkpoint in the output folder; returns the run.

        accept_changed: names of inputs that changed since, such as `train`, `corpus` or `teacher`, to go on with.
        command: what started it, for the record. Raises InputError before anything is written where the input cannot work
        (a folder that holds a run, say), and RunError, with the last checkpoint intact, where the work fails.
        """
        joined()
        self._student = None
        command = command or ["python", *sys.argv]
        if accept_changed and not resume:
            raise InputError("--accept-changed", "is ignored without --resume", "add --resume, or take it out")
        given = replace(self._given, accepted=accept_changed)
        train(self.config, self._product, resume=resume, command=command, quiet=quiet, given=given)
        return self

    @property
    def folder(self) -> Path:
        """The trained model's folder: sentence-transformers, and `load`, read it. Raises InputError before the training."""
        folder = self.output / self._product
        if not folder.is_dir():
            raise InputError(folder, "no trained model is there", "train first")
        return folder

    @property
    def student(self) -> Model:
        """The trained model: of the best checkpoint where an evaluation chose one, else of the last step.

        A module of your own has the trained weights from here on, in its own dtype.
        """
        if self._student is None:
            module, section = self._given.student, self.config.student
            if module is None:
                self._student = load(self.folder, kind=section.kind)
            else:
                load_weights(module, self.folder)
                scorer = OwnEncoder(module, section, student=True).eval()
                self._student = Model(scorer, self._given.student_text(section), {"module": module})
        return self._student

    def save(self, path: str | Path) -> Path:
        """Copy the trained model to a folder, which must not hold anything yet. Every process of a launched run calls this."""
        path = Path(path).expanduser()

        def copy() -> None:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise InputError(path, "is there already", "choose another folder, or delete it")
            shutil.copytree(self.folder, path, dirs_exist_ok=True)

        if launched_world() == 1:
            copy()
            return path
        joined()
        with ranks() as here:
            agreed(here, lambda: copy() if here.main else None)
        return path

    def evaluate(
        self,
        data: str | Path | None = None,
        split: str = "dev",
        *,
        measures: Sequence[str] | None = None,
        **settings: Any,
    ) -> dict[str, float]:
        """The trained model's metrics on a split of a folder with corpus, queries and qrels (default: the run's own).

        A dual encoder searches the corpus exactly; other kinds order what BM25, or the TREC run of the setting `run`, found.
        settings: of the section `evaluation`. Every process of a launched run calls this. Raises InputError for a split or
        measure that is not there.
        """
        joined()
        section = self.config.evaluation.model_dump() | {"split": split, **settings}
        if data is not None:
            section["path"] = str(data)
        if measures is not None:
            section |= {"measures": list(measures), "metric": measures[0]}
        evaluation = parse_section(EvaluationConfig, section, "evaluate")
        config = self.config.model_copy(update={"evaluation": evaluation})
        student = self.student
        with ranks() as here:
            evaluator = Evaluator.open(config, student.encoder, here)
            if evaluator is None:
                place = Path(evaluation.path or config.data.path)
                raise InputError(place / "qrels" / f"{split}.tsv", "no such file", "name a split that has judgements")
            return evaluator(student.scorer)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of the run's metrics.jsonl: a step's loss and its parts, or an evaluation."""
        path = self.output / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def launched_world() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@cache
def joined() -> None:
    """Join a launcher's processes for the rest of this process's life, so that a script may train more than once.

    Where there is one process alone, each training makes and leaves a group of its own.
    """
    if launched_world() > 1:
        stack = ExitStack()
        stack.enter_context(ranks())
        atexit.register(stack.close)
