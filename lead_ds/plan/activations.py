"""Bytes of activations, counted rather than guessed: the real modules run on tensors that have a shape and no data.

PyTorch's fake tensors go through every operator of the forward pass; a ledger adds up what is alive. Attention is counted
as the fused kernels hold it (no [L, L] map).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lead_ds.models.backbone import checkpoint_activations


class Ledger(TorchDispatchMode):
    """Live and peak bytes of the storages that operators create while it is open."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if not isinstance(x, Tensor):
                continue
            storage = x.untyped_storage()
            key = storage._cdata
            if key not in self._known:
                self._known.add(key)
                size = storage.nbytes()
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._release, key, size)
        return out

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def forward_bytes(
    backbone: nn.Module, texts: list[tuple[int, int]], *, training: bool, checkpointing: bool = False
) -> int:
    """Peak bytes of running `backbone` over each (rows, length) of `texts`, one after the other.

    `training`: all of them are kept for the backward pass (with `checkpointing`, only each layer's input, and one
    layer's insides at a time). Else each is let go before the next. The backbone is on the meta device, and left as it
    is.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    model: Any = copy.deepcopy(backbone).train(training)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    if training and checkpointing:
        checkpoint_activations(model)
    with FakeTensorMode(), _fused_attention(), torch.set_grad_enabled(training):
        _give_fake_storage(model)
        known = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
        ledger, kept = Ledger(known), []
        for rows, length in texts:
            ids = torch.ones(rows, length, dtype=torch.long)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with ledger:
                state = model(**inputs).last_hidden_state
            kept.append(state if training else None)
            del state
        inside = ledger.peak
    if training and checkpointing:
        # Of a checkpointed layer the ledger sees the forward pass; in the backward pass one layer's insides come back.
        layers = max(1, int(model.config.get_text_config().num_hidden_layers))
        inside += forward_bytes(backbone, [max(texts, key=lambda t: t[0] * t[1])], training=True) // layers
    return inside


def _give_fake_storage(model: nn.Module) -> None:
    """Replace meta tensors by the fake tensors of the mode that is open; shared ones stay shared."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                tensors[name] = made[id(old)]


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention without dropout: the fused kernels draw it again in the backward pass, the CPU's falls back to full maps."""
    functional: Any = torch.nn.functional
    plain = functional.scaled_dot_product_attention

    def fused(*args: Any, **kwargs: Any) -> Tensor:
        return plain(*args[:4], **{**kwargs, "dropout_p": 0.0})

    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain
