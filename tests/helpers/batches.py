"""The windows of a configuration, as a run reads them."""

from __future__ import annotations

from typing import Any

import torch

from lead_ds.config import Config
from lead_ds.data.batches import Batches
from lead_ds.data.groups.open import open_groups
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.engine.training.distill import open_batches
from lead_ds.models.load import load_text

ALONE = Ranks(0, 0, 1, torch.device("cpu"))


def windows_of(config: Config, ranks: Ranks, groups: Any = None) -> Batches:
    """The windows of one of `ranks`, of the configuration's groups or of others."""
    groups = open_groups(config.data) if groups is None else groups
    return open_batches(config, groups, load_text(config.student), ranks)
