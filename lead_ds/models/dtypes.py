"""In which dtype a model was published, and which of 16 bits it is read in on a device."""

from __future__ import annotations

import torch
from torch import nn

from lead_ds.errors import InputError
from lead_ds.io.located import find_file
from lead_ds.models.files import read_json, transformer_folder


def half_of(path: str, device: torch.device) -> torch.dtype:
    """The dtype of 16 bits in which a model is read on a device where no setting says.

    bfloat16 on a CPU. On a GPU bfloat16 too where the model was published in it and the GPU has it, for its numbers may be
    too large for float16. Else float16, whose numbers are finer.
    """
    if device.type != "cuda":
        return torch.bfloat16
    return torch.bfloat16 if has_bfloat16() and published_in(path) == "bfloat16" else torch.float16


def has_bfloat16() -> bool:
    """Whether the GPU itself computes in bfloat16. V100 and T4 only emulate it, many times slower than float16."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def served_in(path: str, device: torch.device, *, generates: bool) -> torch.dtype:
    """The dtype in which a model encodes, ranks or scores where no setting says.

    On a CPU float32. On a GPU that of 16 bits in which it was published, where the GPU has it; else float32, a language model
    that scores (generates) as `half_of` has it.
    """
    if device.type != "cuda":
        return torch.float32
    if generates or published_in(path) == "float16":
        return half_of(path, device)
    if published_in(path) == "bfloat16" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def dtype_of(scorer: nn.Module) -> str:
    """The dtype of a model's weights, as settings name it."""
    return setting_name(str(next(scorer.parameters()).dtype).removeprefix("torch."))


def setting_name(dtype: str) -> str:
    """bfloat16 -> bf16, and so on; another name as it is."""
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(dtype, dtype)


def published_in(path: str) -> str | None:
    """The dtype that a model's config.json names, as transformers reads it, else that of its weights where they have one."""
    folder = transformer_folder(path)
    config = read_json(path, f"{folder}/config.json" if folder else "config.json")
    inner = config.get("text_config")
    for tree in (config, inner if isinstance(inner, dict) else {}):
        named = tree.get("dtype") or tree.get("torch_dtype")
        if isinstance(named, str):
            return named.removeprefix("torch.")
    found = weight_dtypes(path)
    return {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}.get(found[0]) if len(found) == 1 else None


def weight_dtypes(path: str) -> list[str]:
    """The dtypes of a model's saved weights, by safetensors' names, without reading them; empty where they are pickled."""
    from safetensors import SafetensorError, safe_open

    folder = transformer_folder(path)
    prefix = f"{folder}/" if folder else ""
    shards = read_json(path, f"{prefix}model.safetensors.index.json").get("weight_map") or {"": "model.safetensors"}
    found: set[str] = set()
    for name in sorted(set(shards.values())):
        file = find_file(path, prefix + name)
        if file is None:
            continue
        try:
            with safe_open(file, framework="pt") as weights:
                found |= {str(weights.get_slice(key).get_dtype()) for key in weights.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(file, f"damaged weights: {error}") from error
    return sorted(found)
