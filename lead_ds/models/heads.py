"""The classification heads of transformers' families, as functions of the one state that each reads.

A head reads a pooled state [..., D] and gives logits [..., labels]. Where a family's own head picks the token itself (RoBERTa's
takes `features[:, 0]`), it is given a sequence of that one token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lead_ds.errors import InputError
from lead_ds.models.backbone import is_decoder

PoolingMode = Literal["cls", "mean", "lasttoken"]  # sentence-transformers' names


@dataclass(frozen=True)
class Head:
    """Which state a classification head reads, and what it makes of it. Calls the model's modules: holds no weights."""

    pooling: PoolingMode
    logits: Callable[[Tensor], Tensor]  # [B, D] -> [B, labels]


def classification_head(model: Any, path: str) -> Head:
    """The head of an AutoModelForSequenceClassification. Raises InputError for a family that is not known here."""
    classifier: Any = getattr(model, "classifier", None)
    drop = _dropout(model)
    if isinstance(getattr(model, "score", None), nn.Linear):  # Llama, Qwen, Mistral, Gemma, GPT-2 ...
        return Head("lasttoken", model.score)
    if isinstance(getattr(model, "pre_classifier", None), nn.Linear):  # DistilBERT
        return Head("cls", lambda x: classifier(drop(torch.relu(model.pre_classifier(x)))))
    named = {"cls": "cls", "bos": "cls", "mean": "mean"}.get(str(getattr(model.config, "classifier_pooling", None)))
    pooling: Any = "lasttoken" if is_decoder(model.config) else named
    if (
        pooling and isinstance(getattr(model, "head", None), nn.Module) and isinstance(classifier, nn.Linear)
    ):  # ModernBERT
        return Head(pooling, lambda x: classifier(drop(model.head(x))))
    if (
        pooling and isinstance(getattr(model, "dense", None), nn.Linear) and isinstance(classifier, nn.Linear)
    ):  # EuroBERT
        return Head(pooling, lambda x: classifier(model.activation(model.dense(x))))
    if hasattr(classifier, "dense") and hasattr(classifier, "out_proj"):  # RoBERTa, XLM-R, ELECTRA, MPNet, CamemBERT
        return Head("cls", lambda x: classifier(x.unsqueeze(1)))
    for owner in (model, model.base_model):  # DeBERTa; BERT and its kin
        pooler: Any = getattr(owner, "pooler", None)
        if hasattr(pooler, "dense") and isinstance(classifier, nn.Linear):
            return Head("cls", partial(_pooled, pooler, drop, classifier))
    raise InputError(
        path,
        f"the scoring head of a {model.config.model_type} is not known",
        "those of BERT, RoBERTa, XLM-R, ELECTRA, MPNet, DistilBERT, DeBERTa, ModernBERT, EuroBERT (bos, mean) and decoders are",
    )


def _pooled(pooler: nn.Module, drop: nn.Module, classifier: nn.Module, x: Tensor) -> Tensor:
    return classifier(drop(pooler(x.unsqueeze(1))))


def _dropout(model: Any) -> nn.Module:
    for name in ("dropout", "drop"):
        module = getattr(model, name, None)
        if isinstance(module, nn.Module):
            return module
    return nn.Identity()
