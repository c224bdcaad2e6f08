"""Weights that are not plain matrices of the model's dtype: quantised ones, and experts of which a token reaches a few."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from lead_ds.errors import InputError
from lead_ds.models.dtypes import weight_dtypes

_EXTRA = ("bitsandbytes", "torchao", "compressed-tensors")
_SCALED = {"I8", "F8_E4M3", "F8_E5M2"}  # safetensors' names of numbers that mean nothing without a scale


def quantised_by(shape: Any) -> str | None:
    """The method by which a model's weights are quantised; None for plain weights."""
    said = getattr(shape, "quantization_config", None)
    if said is None:
        return None
    tree = said if isinstance(said, dict) else said.to_dict()
    method = tree.get("quant_method") or (
        "bitsandbytes" if tree.get("load_in_4bit") or tree.get("load_in_8bit") else "?"
    )
    return str(getattr(method, "value", method))


def check_trainable(shape: Any, path: str) -> None:
    """Refuse quantised weights where they would be trained."""
    method = quantised_by(shape)
    if method is not None:
        raise InputError(
            path, f"its weights are quantised ({method}): they cannot be trained", "name the model as it was before"
        )


def check_quantised(shape: Any, path: str) -> None:
    """Refuse quantised weights where they would be sharded, where transformers cannot read them here, and where nothing says how.

    transformers itself would read weights of a method that it does not know as if they were plain.
    """
    method = quantised_by(shape)
    if method is None:
        if odd := sorted(_SCALED & set(weight_dtypes(path))):
            what = f"its weights are quantised ({odd[0]}), and its config.json has no quantization_config"
            raise InputError(path, what, "restore that file, or name the model as it was before")
        return
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise InputError(
            path, f"its weights are quantised ({method}), and cannot be sharded", "set placement: replicate"
        )
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(shape.quantization_config), pre_quantized=True)
        quantizer.validate_environment(device_map=None, weights_only=True)
    except Exception as error:  # a foreign file can be wrong in any way, and so can a package
        what = f"its weights are quantised ({method}): {str(error)[:200]}"
        remedy = 'pip install "lead-ds[quantised]"' if method in _EXTRA else "name the model as it was before"
        raise InputError(path, what, remedy) from error


def keep_experts_together(model: nn.Module) -> list[str]:
    """Let ZeRO-3 gather the experts of a layer as one, for ranks send their tokens to different ones; returns the classes' names.

    Without it ranks would gather different parameters, and wait for each other for ever.
    """
    apart = (nn.ModuleList, nn.ModuleDict)
    blocks = {type(module) for module in model.modules() if isinstance(getattr(module, "experts", None), apart)}
    if not blocks:
        return []
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, sorted(blocks, key=lambda block: block.__name__))
    return sorted(block.__name__ for block in blocks)
