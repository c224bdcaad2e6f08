"""Evaluation while training, with the model as it stands, every rank doing its share: exact search over the corpus. A
model that gives no vector per text reranks what BM25 or a TREC run found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lead_ds.config import Config
from lead_ds.data.collections.dataset import Dataset
from lead_ds.data.collections.qrels import Run
from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.engine.distributed.agreement import agreed
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.errors import InputError
from lead_ds.io.notes import say_once
from lead_ds.models.kinds.kind import KINDS, Kind
from lead_ds.retrieval.evaluate import Task, check_relevant, draw_queries, evaluate_model, evaluate_widths
from lead_ds.retrieval.metrics import parse_measure
from lead_ds.retrieval.mine import bm25_package
from lead_ds.retrieval.rerank import evaluate_reranked, find_candidates
from lead_ds.settings.train import EvaluationConfig


class Evaluator:
    """Evaluates the student on the configured split."""

    def __init__(
        self,
        settings: EvaluationConfig,
        dataset: Dataset,
        encoder: TextEncoder,
        ranks: Ranks,
        seed: int,
        folder: Path,
        keep_identical: bool = False,
    ) -> None:
        self.settings, self.dataset, self.encoder, self.seed = settings, dataset, encoder, seed
        self.ranks, self.folder, self.keep_identical = ranks, folder, keep_identical
        self.found: Run | None = None  # rank 0's candidates, of models that rerank
        self.candidates: Run | None = None  # the same on every rank
        self.dims: Sequence[int] = ()  # the widths that a student is trained at
        self.by_width: dict[int, dict[str, float]] = {}  # what the last evaluation measured at each of them

    @classmethod
    def open(cls, config: Config, encoder: TextEncoder, ranks: Ranks) -> Evaluator | None:
        """None where no split is configured or the data has none of that name.

        Raises InputError for what could not be evaluated; candidates of a TREC run are read now, BM25's looked for later.
        """
        settings = config.evaluation
        folder = Path(settings.path or config.data.path)
        if settings.split is None:
            return None
        if not any((folder / "qrels" / f"{settings.split}.tsv{suffix}").exists() for suffix in ("", ".gz")):
            # The default is no promise; what was requested is.
            default = settings.split == EvaluationConfig().split and settings.path is None
            if folder.is_dir() and (not default or config.train.patience > 0 or config.train.average_by == "dev"):
                what = f"{settings.split}: there is no qrels/{settings.split}.tsv"
                has = ", ".join(Dataset.open(folder).splits) or "none"
                raise InputError(
                    "evaluation.split", f"{what}, so nothing would be evaluated", f"splits here: {has}; or null"
                )
            if ranks.main and folder.is_dir():
                say_once(f"no evaluation while training: {folder} has no qrels/{settings.split}.tsv")
            return None
        if settings.metric not in settings.measures:
            raise InputError(
                "evaluation.metric",
                f"{settings.metric} is not among evaluation.measures",
                "add it to evaluation.measures",
            )
        dataset = Dataset.open(folder)
        # A judged id without a text, and judgements that are all 0, are reported now, not after an hour of training.
        check_relevant(dataset.qrels(settings.split), 1, dataset.judgements(settings.split), "check the judgements")
        for name in settings.measures:
            parse_measure(name)
        evaluator = cls(settings, dataset, encoder, ranks, config.seed, Path(config.output), config.data.keep_identical)
        evaluator.dims = config.student.dims or ()
        if not KINDS[config.student.kind].gives_vectors and ranks.main:
            if settings.run is None:
                bm25_package()
            else:
                evaluator.found = evaluator.find_candidates()
        return evaluator

    @property
    def files(self) -> dict[str, Path]:
        """What it reads, by name: of a run that is resumed they must be what they were, as they decide which step is the best."""
        assert self.settings.split is not None
        found = {f"qrels/{self.settings.split}.tsv": self.dataset.judgements(self.settings.split), **self.dataset.files}
        return found if self.settings.run is None else {**found, "run": Path(self.settings.run)}

    def __call__(self, scorer: Kind) -> dict[str, float]:
        """The measures' means, equal on every rank."""
        settings, split = self.settings, self.settings.split
        assert split is not None
        task = Task(
            self.dataset,
            split,
            settings.measures,
            queries=settings.queries,
            seed=self.seed,
            keep_identical=self.keep_identical,
        )
        options: dict[str, Any] = {"batch_size": settings.batch_size, "peers": self.ranks, "quiet": True}
        if scorer.gives_vectors and self.dims:
            found = evaluate_widths(scorer, self.encoder.serving(), task, self.dims, **options)
            self.by_width = {dim: scores.mean for dim, scores in found.items()}
            return self.by_width[self.dims[-1]]
        if scorer.gives_vectors:
            return evaluate_model(scorer, self.encoder.serving(), task, **options).mean
        if self.candidates is None:
            candidates = agreed(self.ranks, lambda: self.found or (self.find_candidates() if self.ranks.main else {}))
            self.candidates = self.ranks.from_main(candidates)
        return evaluate_reranked(scorer, self.encoder, task, self.candidates, **options).mean

    def find_candidates(self) -> Run:
        """The passages that are reranked, of the run's evaluation queries."""
        assert self.settings.split is not None
        queries = draw_queries(self.dataset.qrels(self.settings.split), self.settings.queries, self.seed)
        options: dict[str, Any] = {"quiet": True, "keep_identical": self.keep_identical}
        return find_candidates(self.dataset, queries, self.settings.depth, self.settings.run, self.folder, **options)


class Evaluators:
    """Evaluates the student on each set of a mixture; the measures are their means, and those of each by its name."""

    def __init__(self, each: Mapping[str, Evaluator]) -> None:
        self.each = each

    @property
    def files(self) -> dict[str, Path]:
        """What each of them reads."""
        return {f"{set_name}: {name}": path for set_name, one in self.each.items() for name, path in one.files.items()}

    def __call__(self, scorer: Kind) -> dict[str, float]:
        """Means over the sets, then `SET/MEASURE` of each, equal on every rank."""
        return together({name: evaluator(scorer) for name, evaluator in self.each.items()})

    @property
    def by_width(self) -> dict[int, dict[str, float]]:
        dims = next(iter(self.each.values())).by_width
        return {dim: together({name: one.by_width[dim] for name, one in self.each.items()}) for dim in dims}


def together(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean of each measure over sets, and that of each set.

    >>> together({"a": {"RR@10": 0.5}, "b": {"RR@10": 0.75}})
    {'RR@10': 0.625, 'a/RR@10': 0.5, 'b/RR@10': 0.75}
    """
    measures = next(iter(found.values()))
    means = {measure: fmean(values[measure] for values in found.values()) for measure in measures}
    return means | {f"{name}/{measure}": value for name, values in found.items() for measure, value in values.items()}


def open_evaluator(config: Config, encoder: TextEncoder, ranks: Ranks) -> Evaluator | Evaluators | None:
    """The evaluation of a run: of its data, or of each set of a mixture that has the split. Raises as `Evaluator.open`."""
    if not config.data.sets or config.evaluation.path is not None:
        return Evaluator.open(config, encoder, ranks)
    output = Path(config.output)
    opened = {
        name: Evaluator.open(config.model_copy(update={"data": part, "output": str(output / name)}), encoder, ranks)
        for name, part in config.data.by_name.items()
    }
    each = {name: evaluator for name, evaluator in opened.items() if evaluator is not None}
    return Evaluators(each) if each else None
