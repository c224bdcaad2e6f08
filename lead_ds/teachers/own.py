"""A torch module of your own as a teacher: frozen, a copy on each rank."""

from __future__ import annotations

from typing import Any

import torch

from lead_ds.models.own import OwnEncoder
from lead_ds.teachers.frozen import FrozenTeacher


class OwnTeacher(FrozenTeacher):
    """Answers windows as any frozen model of vectors does, as far as its module exposes layers."""

    gives = frozenset({"final", "layers", "features"})

    def __init__(self, scorer: OwnEncoder, device: torch.device) -> None:
        super().__init__(scorer.eval().to(device), None, "replicate", device)

    def facts(self) -> dict[str, Any]:
        held, whole = self.parameter_bytes()
        found = {"placement": self.placement, "parameter_bytes": whole, "parameter_bytes_per_rank": held, "lens": None}
        return {**found, "class": type(self.scorer.backbone).__name__}
