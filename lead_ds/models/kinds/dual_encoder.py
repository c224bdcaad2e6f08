"""A dual encoder: one vector per text, relevance their dot product."""

from __future__ import annotations

from typing import Any

import torch

from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.models.files import static_folder
from lead_ds.models.finished_encoder import FinishedEncoder, finished_by
from lead_ds.models.kinds.kind import KINDS
from lead_ds.models.static_encoder import StaticEncoder
from lead_ds.models.vector_encoder import VectorEncoder


@KINDS.register("dual_encoder")
class DualEncoder(VectorEncoder):
    """A VectorEncoder; of a StaticEmbedding, and of code that finishes its vectors, one that has no layers."""

    @classmethod
    def read_text(cls, config: Any) -> TextEncoder:
        if static_folder(config.path) is not None:
            return StaticEncoder.read_text(config)
        return super().read_text(config)

    @classmethod
    def load(cls, config: Any, dtype: torch.dtype, **how: Any) -> Any:
        if static_folder(config.path) is None:
            return super().load(config, dtype, **how)
        frozen, student = how.get("frozen", False), how.get("student", False)
        return StaticEncoder.opened(config, dtype, how.get("layers"), student=student, frozen=frozen)

    @classmethod
    def of_parts(cls, chain: Any, model: Any, config: Any, *, student: bool) -> Any:
        said = finished_by(model, config.path)
        if said is not None:
            return FinishedEncoder(chain, model, config, student=student, said=said)
        return super().of_parts(chain, model, config, student=student)
