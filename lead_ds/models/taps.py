"""Attention taps: the queries and keys that chosen layers' attention really used, read from a model while it runs.

transformers looks its attention functions up by name in one registry. While a tap is open, the entry that the model is
configured for (sdpa, flash attention, eager) is replaced. The function in its place notes q and k, after rotary
embedding and before grouped keys are repeated, and then calls the entry itself. The name stays the same, so the model
builds the same masks and runs the same backend; models that are not tapped pass through.

Dimensions: B texts, H heads, L tokens, d width of a head.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lead_ds.errors import InputError
from lead_ds.models.backbone import check_layers, find_layers

# What an attention function may add to q . k as well as the mask: a tap that left it out would not be the model's
# attention.
_UNTAPPABLE = {"position_bias": "adds a position bias", "softcap": "caps its logits", "s_aux": "has attention sinks"}


class AttentionTapError(InputError, NotImplementedError):
    """The family of the model computes attention in a way that q and k alone do not show."""


@dataclass(frozen=True)
class AttentionTap:
    """What one layer's attention read: its weights are softmax(scale q k^T) over the keys that a row may see.

    q [B, H, L, d] and k [B, H / G, L, d] after rotary embedding; mask [B, L], nonzero = real, as the model was given it
    (None: every token is). causal hides later keys. band hides keys farther than that many positions (None: none).
    """

    q: Tensor
    k: Tensor
    mask: Tensor | None
    scale: float
    causal: bool
    band: int | None


class AttentionTaps(Mapping[int, AttentionTap]):
    """Taps by layer, in the requested order; filled by each forward pass of the backbone, which replaces the last
    one's."""

    def __init__(self, family: str, where: str, layers: Sequence[int], detach: bool) -> None:
        self.family, self.where, self.layers, self.detach = family, where, tuple(layers), detach
        self.mask: Tensor | None = None
        self.ran = False
        # Open from the backbone's first line to its last: recomputation for gradient checkpointing happens after that.
        self.recording = False
        self._taps: dict[int, AttentionTap] = {}

    def __getitem__(self, layer: int) -> AttentionTap:
        if layer in self.layers and layer not in self._taps:
            raise RuntimeError(f"{self.where}: layer {layer} has no attention tap yet; run the model first")
        return self._taps[layer]

    def __iter__(self) -> Iterator[int]:
        return (layer for layer in self.layers if layer in self._taps)

    def __len__(self) -> int:
        return len(self._taps)

    def begin(self, mask: Tensor | None) -> None:
        """A forward pass starts."""
        self._taps.clear()
        self.mask, self.ran, self.recording = mask, True, True

    def end(self) -> None:
        """A forward pass is over, finished or not."""
        self.recording = False

    def record(self, layer: int, module: nn.Module, q: Tensor, k: Tensor, arguments: Mapping[str, Any]) -> None:
        """Note what an attention function was called with. Raises AttentionTapError where q and k are not all of it."""
        for name, what in _UNTAPPABLE.items():
            if arguments.get(name) is not None:
                raise self.error(what)
        if q.shape[2] != k.shape[2]:
            raise self.error(f"attends from {q.shape[2]} tokens to {k.shape[2]}: a cache, or another text")
        if self.detach:
            q, k = q.detach(), k.detach()
        scale, band, causal = (arguments.get(name) for name in ("scaling", "sliding_window", "is_causal"))
        self._taps[layer] = AttentionTap(
            q,
            k,
            self.mask,
            scale=float(q.shape[3] ** -0.5 if scale is None else scale),
            causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
            # transformers counts the token itself: a band of 1 sees no other.
            band=None if band is None else int(band) - 1,
        )

    def error(self, what: str) -> AttentionTapError:
        """The error of a family that cannot be tapped."""
        remedy = "set losses.attention.weight: 0, or use a family whose attention is softmax(scale q k^T + mask)"
        return AttentionTapError(
            self.where, f"attention of the {self.family} family cannot be tapped: it {what}", remedy
        )


@contextmanager
def tap_attention(backbone: Any, layers: Sequence[int], *, detach: bool | None = None) -> Iterator[AttentionTaps]:
    """Record q, k, mask and scale of `layers` in every forward pass of `backbone` while open.

    Args:
        backbone: a transformers model without its task head.
        layers: indices of transformer layers; the mapping that is given keeps their order.
        detach: drop the graph; None: where no parameter of the backbone is trained.

    Raises InputError for an index the model lacks or under reentrant gradient checkpointing. Raises AttentionTapError
    (an InputError and NotImplementedError) for a family that bypasses transformers' attention registry (MPNet, DeBERTa)
    or adds more to its logits than a mask (T5).
    """
    where = getattr(backbone.config, "_name_or_path", "") or type(backbone).__name__
    if detach is None:
        detach = not any(parameter.requires_grad for parameter in backbone.parameters())
    taps = AttentionTaps(backbone.config.get_text_config().model_type, where, layers, detach)
    _, modules = find_layers(backbone)
    check_layers(layers, len(modules), where)
    _check_family(backbone, modules, taps)

    names = {_backend(module) for i in taps.layers for module in modules[i].modules()} - {None}
    hooks = [
        backbone.register_forward_pre_hook(_Begin(taps, backbone), with_kwargs=True),
        backbone.register_forward_hook(lambda *_: taps.end(), always_call=True),
    ]
    sinks = [(module, (taps, i)) for i in taps.layers for module in modules[i].modules()]
    for module, sink in sinks:
        _SINKS.setdefault(module, []).append(sink)
    for name in names:
        _install(str(name))
    try:
        yield taps
    finally:
        for name in names:
            _remove(str(name))
        for module, sink in sinks:
            _SINKS[module].remove(sink)
            if not _SINKS[module]:
                del _SINKS[module]
        for hook in hooks:
            hook.remove()
    if taps.ran and len(taps) < len(set(taps.layers)):
        raise taps.error("does not call transformers' attention functions in every layer")


class _Begin:
    """Opens the taps with the mask the backbone is called with, by position or by name."""

    def __init__(self, taps: AttentionTaps, backbone: Any) -> None:
        self.taps, self.signature = taps, inspect.signature(backbone.forward)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = self.signature.bind_partial(*args, **kwargs).arguments.get("attention_mask")
        self.taps.begin(mask if isinstance(mask, Tensor) and mask.dim() == 2 else None)


def _check_family(backbone: Any, layers: nn.ModuleList, taps: AttentionTaps) -> None:
    if any(name.endswith("relative_attention_bias") for name, _ in backbone.named_modules()):
        raise taps.error(_UNTAPPABLE["position_bias"])
    for i in taps.layers:
        if all(_backend(module) is None for module in layers[i].modules()):
            raise taps.error("bypasses transformers' attention functions")
    if not taps.detach and any(_checkpoints_reentrantly(module) for module in backbone.modules()):
        what = "reentrant gradient checkpointing leaves attention taps without a gradient"
        raise InputError(taps.where, what, 'pass gradient_checkpointing_kwargs={"use_reentrant": False}')


def _checkpoints_reentrantly(module: nn.Module) -> bool:
    function = getattr(module, "_gradient_checkpointing_func", None)
    return bool(
        getattr(module, "gradient_checkpointing", False) and getattr(function, "keywords", {}).get("use_reentrant")
    )


def _backend(module: nn.Module) -> str | None:
    """The name under which a module of attention looks its function up; None for every other module."""
    config = getattr(module, "config", None)
    home = sys.modules[type(module).__module__]
    if config is None or not hasattr(home, "ALL_ATTENTION_FUNCTIONS"):
        return None
    return str(config._attn_implementation)


# --- The registry's entries: replaced while at least one tap is open, whatever the order in which taps close ---

_SINKS: dict[nn.Module, list[tuple[AttentionTaps, int]]] = {}
_REPLACED: dict[str, tuple[Callable[..., Any] | None, int]] = {}


def _install(name: str) -> None:
    from transformers import AttentionInterface

    if name in _REPLACED:
        original, users = _REPLACED[name]
        _REPLACED[name] = (original, users + 1)
        return
    entry: Any = AttentionInterface._global_mapping.get(name)
    _REPLACED[name] = (entry, 1)
    AttentionInterface.register(name, _recorder(entry))


def _remove(name: str) -> None:
    from transformers import AttentionInterface

    original, users = _REPLACED[name]
    if users > 1:
        _REPLACED[name] = (original, users - 1)
        return
    del _REPLACED[name]
    if original is None:
        del AttentionInterface._global_mapping[name]
    else:
        AttentionInterface.register(name, original)


def _recorder(original: Callable[..., Any] | None) -> Callable[..., Any]:
    # Outside of what torch.compile traces: it notes tensors in Python objects.
    @torch.compiler.disable
    def record_and_attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
    ) -> Any:
        for taps, layer in _SINKS.get(module, ()):
            if taps.recording:
                taps.record(layer, module, query, key, arguments)
        # The registry has no entry for eager: every architecture falls back on a function in its own file.
        attend = original or sys.modules[type(module).__module__].eager_attention_forward
        return attend(module, query, key, value, attention_mask, **arguments)

    return record_and_attend
