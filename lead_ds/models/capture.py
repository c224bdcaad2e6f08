"""Reading chosen layers of any backbone while it runs, without keeping whole hidden states.

Index i is the output of transformer layer i; embeddings do not count. Some models normalise once more after their last
layer (ModernBERT's `final_norm`, `norm` of Llama, Qwen, Mistral, Gemma). Every layer's state is then read through that
norm, the logit lens: raw residual streams of decoders hold a few massive coordinates that drown every dot product. The
last layer so read is the model's own final state.

Hooks stand on the layers for good and answer only while a reading is open. They are installed at the first forward
pass, after DeepSpeed's own hooks, so that gradient through a captured state also passes the one that gathers ZeRO-3
parameters. They stay outside gradient checkpointing's recomputation, which must not capture again, and outside of what
torch.compile traces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lead_ds.models.backbone import check_layers, find_layers

_FINAL_NORMS = ("norm", "final_norm", "final_layernorm", "final_layer_norm", "ln_f")

Reduce = Callable[[Tensor], Tensor]


class LayerCapture:
    """Captures the outputs of a backbone's layers. Not a module: it holds references only."""

    def __init__(self, backbone: Any, path: str) -> None:
        name, self.layers = find_layers(backbone)
        owner = backbone.get_submodule(name.rpartition(".")[0])
        norms = (getattr(owner, norm, None) for norm in _FINAL_NORMS)
        self.norm: nn.Module | None = next((norm for norm in norms if isinstance(norm, nn.Module)), None)
        self.path = path
        self._hooks: list[Any] = []
        self._wanted: frozenset[int] = frozenset()
        self._reduce: Reduce | None = None
        self._states: dict[int, Tensor] = {}
        self._error: Exception | None = None

    def __len__(self) -> int:
        return len(self.layers)

    @contextmanager
    def reading(self, layers: Sequence[int], reduce: Reduce) -> Iterator[dict[int, Tensor]]:
        """While open, `reduce(state [B, L, D])` of each of `layers` is put in the dictionary given.

        `reduce` runs inside the hook, before the final norm. Raises InputError for an index the model lacks; what
        `reduce` raises is raised at the end, since raising out of a hook would leave ZeRO-3 layers gathered.
        """
        check_layers(layers, len(self.layers), self.path)
        if not self._hooks:
            self._install()
        states: dict[int, Tensor] = {}
        self._wanted, self._reduce, self._states = frozenset(layers), reduce, states
        try:
            yield states
        finally:
            # The reader's alone from here on: a state holds the graph that made it, and under ZeRO-3 this holds the model.
            error, self._error = self._error, None
            self._wanted, self._reduce, self._states = frozenset(), None, {}
        if error is not None:
            raise error
        missed = sorted(set(layers) - states.keys())
        if missed:
            raise RuntimeError(f"{self.path}: layers {missed} did not run")

    def _install(self) -> None:
        for i, layer in enumerate(self.layers):
            self._hooks.append(layer.register_forward_hook(torch.compiler.disable(partial(self._read, i))))

    def uninstall(self) -> None:
        """Take the hooks away; the next reading installs them again, then behind those that others have installed by
        then."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _read(self, i: int, layer: nn.Module, inputs: Any, output: Any) -> None:
        if i not in self._wanted or self._reduce is None or i in self._states:
            return
        try:
            # Up to 5.20 transformers checkpoints what a layer's hooks do as well: what `reduce` keeps for its gradient would
            # be missed when the layer is run again, so it is kept here as it is.
            # Detached: a result that its own step keeps would hold itself for ever.
            with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, Tensor.detach):
                self._states[i] = self._reduce(output[0] if isinstance(output, (tuple, list)) else output)
        except Exception as error:
            self._error = self._error or error
