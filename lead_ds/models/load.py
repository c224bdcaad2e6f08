"""From a configuration to a scorer; from a directory to a dual encoder with its tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lead_ds.config import ModelConfig, StudentConfig, TeacherConfig
from lead_ds.data.hub import find_file
from lead_ds.errors import InputError
from lead_ds.models.backbone import is_decoder, keep_layers, load_model, read_model_config
from lead_ds.models.colbert import ColBERT
from lead_ds.models.cross_encoder import CrossEncoder
from lead_ds.models.dense import Dense, colbert_linear, load_dense
from lead_ds.models.dual_encoder import DualEncoder
from lead_ds.models.layout import RECORD, Layout, read_json, read_layout, serving_length
from lead_ds.models.llm_reranker import LLMReranker, answer_tokens
from lead_ds.models.scorer import Scorer

if TYPE_CHECKING:
    from lead_ds.data.tokens import TextEncoder

__all__ = ["load_encoder", "load_student", "load_teacher", "read_model_config"]


def load_teacher(config: TeacherConfig, dtype: torch.dtype) -> Scorer:
    """The scorer of a teacher's configuration, in evaluation mode; sharded where an HfDeepSpeedConfig is active.

    Raises InputError: see `lead_ds.models.backbone.load_model`; also a cross-encoder without a trained head.
    """
    return _load(config, config.kind, dtype)


def load_student(config: StudentConfig, dtype: torch.dtype) -> Scorer:
    """The scorer of a student's configuration, in training mode, cut to `layers` where those are given."""
    return _load(config, config.kind, dtype).train()


def load_encoder(path: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> tuple[DualEncoder, TextEncoder]:
    """A dual encoder in evaluation mode and its tokenisation, from a saved student, a sentence-transformers or HF directory.

    Its tokenisation is the one that is served: queries may be as long as passages (`TextEncoder.serving`), and these as
    long as the model was saved for. `overrides` are fields of StudentConfig.
    Raises InputError for a directory that holds another kind of model.
    """
    from lead_ds.data.tokens import TextEncoder

    settings: dict[str, Any] = {"path": str(path), "kind": "dual_encoder"}
    record = _record(str(path))
    if record.get("kind", "dual_encoder") != "dual_encoder":
        raise InputError(path, f"holds a {record['kind']}", "a dual encoder is needed here")
    longest = serving_length(str(path))
    if longest is not None:
        settings |= {"query_length": longest, "passage_length": longest}
    settings |= {key: record[key] for key in ("query_length", "passage_length", "scale") if key in record}
    config = StudentConfig(**(settings | overrides))
    scorer = _load(config, "dual_encoder", dtype)
    assert isinstance(scorer, DualEncoder)
    return scorer, TextEncoder.from_config(config).serving()


def _load(config: ModelConfig, kind: str, dtype: torch.dtype) -> Scorer:
    layout = read_layout(config.path, late_interaction=kind != "dual_encoder")
    if kind == "dual_encoder":
        model = _cut(load_model(config, "base", dtype, layout.subfolder), config)
        pooling = layout.pooling or ("last" if is_decoder(model.config) else "cls")
        if config.pooling != "auto":
            pooling = config.pooling
        normalize = layout.normalize if config.normalize is None else config.normalize
        dense = _dense(config, layout, model, config.projection, "projection", dtype)
        return DualEncoder(model, config, pooling, dense, normalize).eval()
    if kind == "colbert":
        model = _cut(load_model(config, "base", dtype, layout.subfolder), config)
        tokens = layout if layout.late_interaction else Layout()  # Dense on a pooled vector is no token projection
        dense = _dense(config, tokens, model, config.token_dim, "token_dim", dtype)
        normalize = bool(_record(config.path).get("normalize", tokens.normalize))
        if not tokens.dense and config.weights == "pretrained":
            published = colbert_linear(config.path, dtype)
            if published is not None:
                dense, normalize = [published], True
        return ColBERT(model, config, dense, normalize if config.normalize is None else config.normalize).eval()
    if kind == "cross_encoder":
        return CrossEncoder(_cut(load_model(config, "classifier", dtype, layout.subfolder), config), config).eval()
    assert isinstance(config, TeacherConfig)
    from lead_ds.data.tokens import load_tokenizer

    tokenizer = load_tokenizer(config.path, layout.subfolder, config.trust_remote_code)
    yes, no = answer_tokens(tokenizer, config)
    return LLMReranker(load_model(config, "causal", dtype, layout.subfolder), config, yes, no).eval()


def _record(path: str) -> dict[str, Any]:
    file = find_file(path, RECORD)
    record = {} if file is None else read_json(file)
    if not isinstance(record, dict):
        raise InputError(file, "not a JSON object")
    return record


def _cut(model: Any, config: ModelConfig) -> Any:
    if isinstance(config, StudentConfig) and config.layers is not None:
        keep_layers(model, config.layers, config.path)
    return model


def _dense(
    config: ModelConfig, layout: Layout, model: Any, width: int | None, key: str, dtype: torch.dtype
) -> list[Dense]:
    """The model's own Dense layers, or a new one of the width asked for."""
    hidden = int(model.config.get_text_config().hidden_size)
    if layout.dense and config.weights == "pretrained":
        dense = [load_dense(config.path, folder, dtype) for folder in layout.dense]
        if width is not None and width != dense[-1].out_features:
            raise InputError(key, f"{width} asked of a model that comes with one to {dense[-1].out_features}")
        return dense
    return [] if width is None else [Dense(hidden, width, bias=key == "projection", dtype=dtype)]
