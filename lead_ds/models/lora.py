"""LoRA inside a scorer: its transformer frozen, low-rank updates trained, merged when it is saved (arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lead_ds.errors import InputError
from lead_ds.models.merging import require_peft
from lead_ds.models.own import OwnEncoder
from lead_ds.models.scorer import Scorer

_NAME = "default"  # of peft's adapter


def add_lora(scorer: Scorer, settings: Any) -> None:
    """Freeze a scorer's transformer and add updates to linear layers of it, by `train.lora`. In place, with random draws.

    What stands behind the transformer (a scoring head, Dense layers) is trained as it is. An update begins as zero. Raises
    InputError for a target that names no linear layer, and where peft is not installed.
    """
    if isinstance(scorer, OwnEncoder):
        raise InputError("train.lora", "the student is a module of your own", "add LoRA to it yourself, or take it out")
    peft = require_peft("train.lora")
    inside = {id(part) for layer in scorer.capture.layers for part in layer.modules() if type(part) is nn.Linear}
    names = [name for name, part in scorer.model.named_modules() if id(part) in inside]
    chosen = _chosen(names, settings.targets, scorer.config.path)
    frozen = {id(p) for p in scorer.backbone.parameters()}
    heads = [(p, p.requires_grad) for p in scorer.model.parameters() if id(p) not in frozen]
    config = peft.LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=chosen
    )
    peft.inject_adapter_in_model(config, scorer.model, adapter_name=_NAME)
    for parameter, trained in heads:  # peft has frozen them as well
        parameter.requires_grad_(trained)


def without_lora(scorer: Scorer, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A scorer's whole state dict with its updates merged, under the names that it has without LoRA.

    W + alpha / r B A, computed in float32. `state` is emptied.
    """
    found: dict[str, Tensor] = {}
    for name in [name for name in state if ".lora_" not in name]:
        owner, base, kind = name.rpartition(".base_layer.")
        weight = state.pop(name)
        if base and kind == "weight":
            down, up = (state.pop(f"{owner}.lora_{side}.{_NAME}.weight") for side in "AB")
            scaling: float = scorer.get_submodule(owner).scaling[_NAME]  # type: ignore[index,assignment]
            weight = (weight.float() + scaling * (up.float() @ down.float())).to(weight.dtype)
        found[f"{owner}.{kind}" if base else name] = weight
    return found


def _chosen(names: Sequence[str], targets: Sequence[str] | None, path: str) -> list[str]:
    """The layers that `targets` name, by their last names or whole ones."""
    last = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
    if not names:
        raise InputError("train.lora", f"the layers of {path} have no linear layers", "train it whole: train.lora=null")
    if targets is None:
        return list(names)
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise InputError("train.lora.targets", f"{target} is no linear layer of {path}", f"it has {last}")
    return [name for name in names if any(name == target or name.endswith(f".{target}") for target in targets)]
