"""From a configuration to a scorer; from a directory to a dual encoder with its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lead_ds.config import StudentConfig, TeacherConfig
from lead_ds.errors import InputError
from lead_ds.io.hub import find_file
from lead_ds.models.backbone import has_classifier, is_decoder, keep_layers, load_model, read_model_config
from lead_ds.models.dense import Dense, colbert_linear, load_dense
from lead_ds.models.kinds.colbert import ColBERT
from lead_ds.models.kinds.cross_encoder import CrossEncoder
from lead_ds.models.kinds.dual_encoder import DualEncoder
from lead_ds.models.kinds.llm_reranker import LLMReranker, answer_tokens
from lead_ds.models.layout import RECORD, Layout, read_json, read_layout, serving_length
from lead_ds.models.scorer import Scorer
from lead_ds.settings.model import ModelConfig
from lead_ds.settings.parse import apply_override, parse_section

if TYPE_CHECKING:
    from lead_ds.data.tokens.encoder import TextEncoder

__all__ = ["load_encoder", "load_scorer", "load_student", "load_teacher", "read_model_config"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LENGTHS = ("query_length", "passage_length", "max_length")


def load_teacher(config: TeacherConfig, dtype: torch.dtype, depth: int | None = None) -> Scorer:
    """The scorer of a teacher's configuration, in evaluation mode; sharded where an HfDeepSpeedConfig is active.

    depth: build its first layers only. They say what they say in the whole model; the final state is another one.

    Raises InputError: see `lead_ds.models.backbone.load_model`; also a cross-encoder without a trained head.
    """
    return _load(config, config.kind, dtype, depth)


def load_student(config: StudentConfig, dtype: torch.dtype) -> Scorer:
    """The scorer of a student's configuration, in training mode, cut to `layers` where those are given."""
    return _load(config, config.kind, dtype).train()


def load_encoder(path: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> tuple[DualEncoder, TextEncoder]:
    """A dual encoder in evaluation mode and its tokenisation, from a saved student, a sentence-transformers or HF directory.

    Its tokenisation is the one that is served: queries may be as long as passages (`TextEncoder.serving`), and these as
    long as the model was saved for. `overrides` are fields of StudentConfig.
    Raises InputError for a directory that holds another kind of model.
    """
    from lead_ds.data.tokens.encoder import TextEncoder

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


def load_scorer(
    path: str, kind: str | None = None, settings: Sequence[str] = (), device: torch.device | str = "cpu"
) -> tuple[Scorer, TextEncoder]:
    """A model of any kind in evaluation mode (not yet on `device`), and its tokenisation as it was saved.

    kind: dual_encoder, colbert, cross_encoder or llm_reranker; None: what its files say. settings: `key=value` of a teacher's
    section, which win over the files (of a dual encoder: a student's). Weights are float32 unless `dtype` says otherwise,
    an llm_reranker's on CUDA float16.
    Raises InputError for a directory that holds another kind of model, and for a setting that is none.
    """
    from lead_ds.data.tokens.encoder import TextEncoder

    tree: dict[str, Any] = {}
    for setting in settings:
        apply_override(tree, setting, TeacherConfig)
    record = _record(path)
    kind = kind or kind_of(path)
    if record.get("kind", kind) != kind:
        raise InputError(path, f"holds a {record['kind']}", f"it cannot be read as a {kind}")
    lengths = {name: record[name] for name in _LENGTHS if name in record}
    if kind == "dual_encoder":
        student = parse_section(StudentConfig, {"path": path, **tree}, path)
        dtype = DTYPES.get(student.dtype, torch.float32)
        return load_encoder(path, dtype, **{name: getattr(student, name) for name in tree if name != "path"})
    config = parse_section(TeacherConfig, {"path": path, "kind": kind, **lengths, **tree}, path)
    half = kind == "llm_reranker" and torch.device(device).type == "cuda"
    dtype = DTYPES.get(config.dtype, torch.float16 if half else torch.float32)
    return load_teacher(config, dtype), TextEncoder.from_config(config)


def kind_of(path: str) -> str:
    """The kind of a model, by its record, its modules or its architecture; a dual encoder where these tell nothing else."""
    kind = _record(path).get("kind")
    if kind is not None:
        return str(kind)
    layout = read_layout(path, late_interaction=True)
    if layout.late_interaction:
        return "colbert"
    if layout.pooling is not None:
        return "dual_encoder"
    shape = read_model_config(StudentConfig(path=path))
    if any("ColBERT" in str(name) for name in shape.architectures or ()):
        return "colbert"
    return "cross_encoder" if has_classifier(shape) else "dual_encoder"


def _load(config: Any, kind: str, dtype: torch.dtype, depth: int | None = None) -> Scorer:
    layout = read_layout(config.path, late_interaction=kind != "dual_encoder")
    if kind == "dual_encoder":
        model = _cut(load_model(config, "base", dtype, layout.subfolder, depth), config)
        pooling = layout.pooling or ("last" if is_decoder(model.config) else "cls")
        if config.pooling != "auto":
            pooling = config.pooling
        normalize = layout.normalize if config.normalize is None else config.normalize
        dense = _dense(config, layout, model, config.projection, "projection", dtype)
        return DualEncoder(model, config, pooling, dense, normalize).eval()
    if kind == "colbert":
        model = _cut(load_model(config, "base", dtype, layout.subfolder, depth), config)
        tokens = layout if layout.late_interaction else Layout()  # Dense on a pooled vector is no token projection
        normalize = bool(_record(config.path).get("normalize", tokens.normalize))
        published = None
        if not tokens.dense and config.weights == "pretrained":
            published = colbert_linear(config.path, dtype)
        if published is not None:
            dense, normalize = [published], True
        else:
            dense = _dense(config, tokens, model, config.token_dim, "token_dim", dtype)
        return ColBERT(model, config, dense, normalize if config.normalize is None else config.normalize).eval()
    if kind == "cross_encoder":
        return CrossEncoder(
            _cut(load_model(config, "classifier", dtype, layout.subfolder, depth), config), config
        ).eval()
    assert isinstance(config, TeacherConfig)
    from lead_ds.data.tokens.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.path, layout.subfolder, config.trust_remote_code)
    yes, no = answer_tokens(tokenizer, config)
    return LLMReranker(load_model(config, "causal", dtype, layout.subfolder, depth), config, yes, no).eval()


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
    if width is None:
        return []
    if isinstance(config, TeacherConfig) and not config.train and config.weights == "pretrained":
        what = f"is {width}, and the model at {config.path} has no such layer: a frozen teacher's would stay random"
        raise InputError(f"teacher.{key}", what, "take it out, or warm the teacher up with it first")
    return [Dense(hidden, width, bias=key == "projection", dtype=dtype)]
