"""Weights that are not plain matrices of the model's dtype: quantised ones, and experts of which a token reaches a few."""

from __future__ import annotations

import copy
from typing import Any

import torch
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
    blocks = {type(module) for module in expert_blocks(model)}
    if not blocks:
        return []
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, sorted(blocks, key=lambda block: block.__name__))
    return sorted(block.__name__ for block in blocks)


def check_trained_sharded(model: nn.Module) -> None:
    """Refuse to train experts under ZeRO-3 that it would gather as one: their gradients would come with each forward pass."""
    if blocks := expert_blocks(model):
        what = f"is of stage 3, which cannot train experts that are modules of their own ({type(blocks[0]).__name__})"
        raise InputError("deepspeed.student", what, "choose a configuration of stage 1 or 2")


def reach_all_experts(model: nn.Module) -> None:
    """Let a backward pass give zeros to experts that no token reached: ranks add up the gradients of the same parameters."""
    for block in expert_blocks(model):
        block.register_forward_hook(_with_all_experts)


def _with_all_experts(block: nn.Module, _: Any, said: Any) -> Any:
    if not torch.is_grad_enabled():
        return said
    nothing = sum(0.0 * p.flatten()[0] for p in _experts(block).parameters() if p.requires_grad)
    return (said[0] + nothing, *said[1:]) if isinstance(said, tuple) else said + nothing


def expert_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that hold experts, each of them a module of its own. transformers' own classes hold all of them in one."""
    return [module for module in model.modules() if isinstance(_experts(module), (nn.ModuleList, nn.ModuleDict))]


def _experts(block: nn.Module) -> Any:
    return getattr(block, "experts", None)
