"""Weights that are not plain matrices of the model's dtype: quantised ones, and experts of which a token reaches a few."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn

from lead_ds.errors import InputError

_PACKAGES = {
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "quanto": "optimum.quanto",
    "hqq": "hqq",
    "compressed-tensors": "compressed_tensors",
    "eetq": "eetq",
    "fbgemm_fp8": "fbgemm_gpu",
    "aqlm": "aqlm",
}


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
    """Refuse quantised weights where they would be sharded, and where the package that reads them is absent."""
    method = quantised_by(shape)
    if method is None:
        return
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise InputError(
            path, f"its weights are quantised ({method}), and cannot be sharded", "set placement: replicate"
        )
    package = _PACKAGES.get(method, method)
    if package != "fp8" and importlib.util.find_spec(package.split(".")[0]) is None:
        raise InputError(
            path, f"its weights are quantised by {method}, which is not installed", f"pip install {package}"
        )


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
