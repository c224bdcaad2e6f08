"""A linear read-out on top of pooled vectors or of tokens, as sentence-transformers and PyLate save it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lead_ds.errors import InputError
from lead_ds.io.hub import find_file
from lead_ds.models.layout import read_json

_ACTIVATIONS = {"Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid"}


class Dense(nn.Module):
    """activation(linear(x)), plus x itself where residual. [..., in_features] -> [..., out_features]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        activation: str = "Identity",
        residual: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
        self.activation = getattr(nn, activation)()
        self.residual: nn.Linear | None = None
        if residual and in_features != out_features:
            self.residual = nn.Linear(in_features, out_features, bias=False, dtype=dtype)
        self.settings: dict[str, Any] = {"in_features": in_features, "out_features": out_features, "bias": bias}
        self.settings["activation_function"] = f"torch.nn.modules.{_module_of(activation)}.{activation}"
        if residual:
            self.settings["use_residual"] = True

    @property
    def out_features(self) -> int:
        """Width of the output, also where ZeRO-3 has sharded the weight."""
        return int(self.settings["out_features"])

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        out = self.activation(self.linear(x))
        if self.settings.get("use_residual"):
            out = out + (x if self.residual is None else self.residual(x))
        return out


def load_dense(path: str, folder: str, dtype: torch.dtype) -> Dense:
    """A Dense module saved in `folder` of a model directory or hub repository; InputError where it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    where = f"{path}/{folder}"
    files = {name: find_file(path, f"{folder}/{name}") for name in ("config.json", "model.safetensors")}
    for name, file in files.items():
        if file is None:
            raise InputError(where, f"{name} is absent", "pickled Dense weights are not read")
    settings_file, weights_file = Path(str(files["config.json"])), Path(str(files["model.safetensors"]))
    settings = read_json(settings_file)
    activation = str(settings.get("activation_function") or "Identity")
    name = activation.rsplit(".", 1)[-1]
    if name not in _ACTIVATIONS or not (activation == name or activation.startswith("torch.nn.")):
        raise InputError(settings_file, f"activation {activation} is not supported")
    try:
        dense = Dense(
            int(settings["in_features"]),
            int(settings["out_features"]),
            bias=bool(settings.get("bias", True)),
            activation=name,
            residual=bool(settings.get("use_residual", False)),
            dtype=dtype,
        )
        dense.load_state_dict(load_file(weights_file))
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(where, f"its weights do not fit its config.json: {str(error).splitlines()[0]}") from None
    return dense


def colbert_linear(path: str, dtype: torch.dtype) -> Dense | None:
    """The token projection that the original ColBERT keeps among its backbone's weights as `linear.weight`, if any."""
    from safetensors import SafetensorError, safe_open

    file = find_file(path, "model.safetensors")
    if file is None:
        return None
    try:
        with safe_open(file, framework="pt") as weights:
            if "linear.weight" not in weights.keys():  # noqa: SIM118 - not a dictionary
                return None
            weight_OD = weights.get_tensor("linear.weight")
    except SafetensorError as error:
        raise InputError(path, f"damaged weights: {error}") from None
    dense = Dense(weight_OD.shape[1], weight_OD.shape[0], bias=False, dtype=dtype)
    dense.load_state_dict({"linear.weight": weight_OD})
    return dense


def _module_of(activation: str) -> str:
    return "linear" if activation == "Identity" else "activation"
