"""Evaluation while training: exact search over the corpus with the student as it stands, every rank encoding its share."""

from __future__ import annotations

from pathlib import Path

from lead_ds.config import Config, EvaluationConfig
from lead_ds.data.dataset import Dataset
from lead_ds.data.tokens import TextEncoder
from lead_ds.engine.ranks import Ranks
from lead_ds.errors import InputError
from lead_ds.models.scorer import Scorer
from lead_ds.retrieval.evaluate import evaluate_model


class Evaluator:
    """Evaluates the student on the configured split."""

    def __init__(
        self, settings: EvaluationConfig, dataset: Dataset, encoder: TextEncoder, ranks: Ranks, seed: int
    ) -> None:
        self.settings, self.dataset, self.encoder, self.seed = settings, dataset, encoder.serving(), seed
        self.ranks = ranks

    @classmethod
    def open(cls, config: Config, encoder: TextEncoder, ranks: Ranks) -> Evaluator | None:
        """None where no split is configured or the data has none of that name, and for a student without vectors."""
        settings = config.evaluation
        folder = Path(config.data.path)
        if settings.split is None or config.student.kind != "dual_encoder":
            return None
        if not any((folder / "qrels" / f"{settings.split}.tsv{suffix}").exists() for suffix in ("", ".gz")):
            return None
        if settings.metric not in settings.measures:
            raise InputError(
                "evaluation.metric",
                f"{settings.metric} is not among evaluation.measures",
                "add it to evaluation.measures",
            )
        dataset = Dataset.open(folder)
        dataset.qrels(settings.split)  # a judged id without a text is told now, not after an hour of training
        return cls(settings, dataset, encoder, ranks, config.seed)

    def __call__(self, scorer: Scorer) -> dict[str, float]:
        """The measures' means, equal on every rank."""
        assert self.settings.split is not None
        scores = evaluate_model(
            scorer,
            self.encoder,
            self.dataset,
            self.settings.split,
            self.settings.measures,
            queries=self.settings.queries,
            seed=self.seed,
            batch_size=self.settings.batch_size,
            peers=self.ranks,
            quiet=True,
        )
        return scores.mean
