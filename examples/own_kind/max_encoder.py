"""A dual encoder that pools by the maximum over a text's tokens: `kind: max_encoder`.

After `pip install examples/own_kind` every command of lead-ds knows it, as a teacher and as a student:
`lead-ds distill run.yaml student.kind=max_encoder`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.models.chain import replace_modules
from lead_ds.models.kinds.dual_encoder import DualEncoder
from lead_ds.models.kinds.kind import Use
from lead_ds.models.text import Reading
from lead_ds.settings.model import TextConfig


class MaxEncoderConfig(TextConfig):
    """Its section of a configuration: only what it reads."""

    kind: Literal["max_encoder"] = "max_encoder"
    normalize: bool = Field(True, description="unit-length vectors")


class MaxEncoder(DualEncoder):
    """Relevance, layer by layer, is the dual encoder's; how token states become one vector is its own."""

    name = "max_encoder"
    Settings = MaxEncoderConfig
    use = Use("max-pooled dual encoder", "sentence-transformers", "sentence-similarity", (), DualEncoder.use.example)

    @classmethod
    def claims(cls, path: str) -> int:
        return 0  # a directory is of this kind only where its record says so

    @classmethod
    def read_text(cls, config: Any) -> TextEncoder:
        lengths = {"query_length": config.query_length, "passage_length": config.passage_length}
        return Reading.of(config, cls.family).encoder(lengths)

    @classmethod
    def complete(cls, chain: Any, model: Any, config: Any, *, frozen: bool) -> None:
        from sentence_transformers.base.modules import Normalize
        from sentence_transformers.sentence_transformer.modules import Pooling

        width = int(model.config.get_text_config().hidden_size)
        replace_modules(chain, [Pooling(width, "max"), *([Normalize()] if config.normalize else [])])
