"""Evaluation while training: exact search over the corpus with the student as it stands, every rank encoding its share."""

from __future__ import annotations

from lead_ds.config import Config
from lead_ds.data.tokens import TextEncoder
from lead_ds.engine.ranks import Ranks
from lead_ds.models.scorer import Scorer


class Evaluator:
    """Evaluates the student on the configured split."""

    @classmethod
    def open(cls, config: Config, encoder: TextEncoder, ranks: Ranks) -> Evaluator | None:
        """None where no split is configured, or the data has none of that name."""
        if config.evaluation.split is None:
            return None
        raise AssertionError

    def __call__(self, scorer: Scorer) -> dict[str, float]:
        raise AssertionError
