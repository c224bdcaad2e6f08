"""A tuned lens: one small affine read-out per layer of a frozen model, on the pooled state that the layer's own read-out reads.

A frozen model's head, or its vector space, is that of its last layer. Lower layers know more than can be read through
it (Belrose et al., Eliciting Latent Predictions from Transformers with the Tuned Lens, arXiv 2303.08112). Of layer k
with pooled state x [D]:

    scores (cross-encoder, decoder reranker):  g_k head(x) + w_k . x
    vectors (dual encoder):                    g_k x + B_k A_k x + b_k, for queries and passages alike; then unit length if so

With g one and w, B and b zero it leaves the model as it is. The final state is never changed.

Dimensions: T layers of the model, K selected ones, B texts or pairs, D width, R rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lead_ds.errors import InputError
from lead_ds.io.json_text import parse_json

VERSION = 1
WEIGHTS, RECORD = "lens.safetensors", "lens.json"
Form = Literal["scores", "vectors"]
_NAMES = {"scores": {"gain_T": 1, "weight_TD": 2}, "vectors": {"gain_T": 1, "down_TRD": 3, "up_TRD": 3, "bias_TD": 2}}


class Lens:
    """The read-outs of all layers, float32. No module: beside a sharded model it stays whole on every rank."""

    def __init__(self, form: Form, tensors: dict[str, Tensor]) -> None:
        self.form: Form = form
        self.tensors = tensors

    @classmethod
    def identity(cls, form: Form, layers: int, width: int, rank: int, seed: int = 0) -> Lens:
        """A lens that changes nothing, ready to be fitted: of vectors, A is drawn by `seed` and layer."""
        if form == "scores":
            return cls(form, {"gain_T": torch.ones(layers), "weight_TD": torch.zeros(layers, width)})
        rank = min(rank, width)
        down = []
        for layer in range(layers):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
            down.append(torch.randn(rank, width, generator=generator) / width**0.5)
        return cls(
            form,
            {
                "gain_T": torch.ones(layers),
                "down_TRD": torch.stack(down),
                "up_TRD": torch.zeros(layers, rank, width),
                "bias_TD": torch.zeros(layers, width),
            },
        )

    def __len__(self) -> int:
        """T."""
        return len(next(iter(self.tensors.values())))

    def layer(self, layer: int) -> Lens:
        """The read-out of one layer alone."""
        return Lens(self.form, {name: tensor[layer : layer + 1] for name, tensor in self.tensors.items()})

    @classmethod
    def joined(cls, lenses: Sequence[Lens]) -> Lens:
        """Read-outs of layers, in order, as one lens."""
        first = lenses[0]
        return cls(first.form, {name: torch.cat([lens.tensors[name] for lens in lenses]) for name in first.tensors})

    def to(self, device: torch.device | str) -> Lens:
        """The same on another device."""
        return Lens(self.form, {name: tensor.to(device) for name, tensor in self.tensors.items()})

    def through(self, own: Tensor, states_KBD: Tensor, layers: Sequence[int]) -> Tensor:
        """What `layers` say: `own`, the scores [K, B] by the model's head or its vectors [K, B, D], put right. float32."""
        picked = {name: tensor[list(layers)] for name, tensor in self.tensors.items()}
        x_KBD = states_KBD.float()
        if self.form == "scores":
            added_KB = torch.bmm(x_KBD, picked["weight_TD"].unsqueeze(-1)).squeeze(-1)
            return picked["gain_T"].unsqueeze(-1) * own.float() + added_KB
        low_KBR = torch.bmm(x_KBD, picked["down_TRD"].transpose(1, 2))
        own_KBD = picked["gain_T"].view(-1, 1, 1) * own.float()
        return own_KBD + torch.bmm(low_KBR, picked["up_TRD"]) + picked["bias_TD"].unsqueeze(1)

    def __call__(self, own: Tensor, states: Sequence[Tensor], layers: Sequence[int]) -> Tensor:
        """`own` [K + 1, ...] of `layers` and of the final state, which stays as it is. Vectors keep their dtype."""
        if not layers:
            return own
        said = self.through(own[:-1], torch.stack(list(states[:-1])), layers)
        if self.form == "scores":
            return torch.cat([said, own[-1:].float()])
        return torch.cat([said.to(own.dtype), own[-1:]])

    def checksum(self, facts: dict[str, Any]) -> str:
        """A hash of the read-outs and of what decides their meaning."""
        digest = hashlib.blake2b(json.dumps([self.form, facts], sort_keys=True).encode(), digest_size=16)
        for name in sorted(self.tensors):
            array = self.tensors[name].detach().cpu().contiguous().numpy()
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(array.data)
        return digest.hexdigest()

    def save_weights(self, path: Path) -> None:
        """Write the tensors as safetensors."""
        from safetensors.torch import save_file

        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}, path)


def load_lens(folder: Path, remedy: str) -> tuple[Lens, dict[str, Any]]:
    """A lens and its record, as `fit_lens` wrote them. Raises InputError: absent (with `remedy`), damaged, of another version."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        record = parse_json((folder / RECORD).read_text("utf-8"))
        version = record["version"]
    except FileNotFoundError:
        raise InputError(folder, "holds no tuned lens", remedy) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(folder / RECORD, f"cannot be read: {error}", "fit it again") from None
    if version != VERSION:
        raise InputError(folder / RECORD, f"is of version {version}, this is {VERSION}", "fit it again")
    try:
        lens = Lens(record["form"], load_file(folder / WEIGHTS))
        wanted = _NAMES[lens.form]
        if {name: tensor.dim() for name, tensor in lens.tensors.items()} != wanted:
            raise ValueError("other tensors than its kind has")
        if lens.checksum(record["facts"]) != record["checksum"]:
            raise ValueError("its checksum differs")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(folder / WEIGHTS, f"is damaged: {error}", "fit it again") from None
    return lens, record
