"""Cutting a model in width: its hidden dimensions, attention heads and feed-forward neurons, by what they do on a sample.

What is left is a plain smaller model of the same architecture. Such a model is as wide as its heads together, so heads and
hidden dimensions are cut alike. How much a part does is its mean absolute activation, as in Muralidharan et al., Compact
Language Models via Pruning and Knowledge Distillation (arXiv 2407.14679).

Dimensions: B rows, L tokens, D hidden, H heads, E of one head, F feed-forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lead_ds.errors import InputError
from lead_ds.models.chain import replace_modules
from lead_ds.models.kinds.kind import Kind
from lead_ds.settings.roles import WidthConfig

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert")

Kept = dict[str, Tensor]
"""Sorted indices of what is kept: "hidden" of the whole model; "heads.I" and "feed_forward.I" of each layer I."""


@dataclass(frozen=True)
class Sizes:
    """Of a model of one of `FAMILIES`."""

    hidden: int
    heads: int
    feed_forward: int

    @classmethod
    def of(cls, shape: Any) -> Sizes:
        """Those of a configuration."""
        return cls(shape.hidden_size, shape.num_attention_heads, shape.intermediate_size)


def sizes_after(width: WidthConfig, scorer: Kind) -> Sizes:
    """The sizes that a student will have. Raises InputError for another architecture, and for sizes that it cannot have."""
    shape = getattr(scorer.model, "config", None)
    family = getattr(shape, "model_type", type(scorer.model).__name__)
    if family not in FAMILIES:
        what = f"{scorer.config.path} is a {family}, and only models of {', '.join(FAMILIES)} are cut in width"
        raise InputError("student.width", what, "take it out; student.layers cuts any architecture")
    have = Sizes.of(shape)
    for name in ("hidden", "heads", "feed_forward"):
        asked, there = getattr(width, name), getattr(have, name)
        if asked is not None and asked > there:
            raise InputError(f"student.width.{name}", f"is {asked}, and the model has {there}", f"use at most {there}")
    size = have.hidden // have.heads
    hidden = width.hidden or (width.heads or have.heads) * size
    if hidden % size:
        what = f"is {hidden}, and a {family} is as wide as its heads together, which here have {size} each"
        below = hidden // size * size
        raise InputError("student.width.hidden", what, f"use {f'{below} or ' if below else ''}{below + size}")
    if width.heads is not None and width.heads * size != hidden:
        what = f"is {width.heads}, and {hidden} hidden dimensions are those of {hidden // size} heads"
        raise InputError("student.width.heads", what, "take one of the two out: it follows from the other")
    return Sizes(hidden, hidden // size, width.feed_forward or have.feed_forward)


class Importance:
    """Sums of absolute activations over the tokens that a model reads, by part; as `Kept` names them."""

    def __init__(self, scorer: Kind) -> None:
        self.scorer = scorer
        self.sums: dict[str, Tensor] = {}
        self._real_BL: Tensor | None = None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While open, what the model reads is counted."""
        backbone, layers = self.scorer.backbone, _layers(self.scorer)
        hooks = []
        hooks.append(backbone.register_forward_pre_hook(self._begin, with_kwargs=True))
        hooks.append(backbone.embeddings.register_forward_hook(self._of_output))
        for i, layer in enumerate(layers):
            hooks.append(layer.register_forward_hook(self._of_output))
            for name, module in (("heads", layer.attention.output.dense), ("feed_forward", layer.output.dense)):
                hooks.append(module.register_forward_pre_hook(_of_input(self, f"{name}.{i}")))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def add(self, name: str, state_BLX: Tensor) -> None:
        """Count the activations of one part; those of padding count nothing."""
        sum_X = state_BLX.detach().float().abs()
        if self._real_BL is not None:
            sum_X = sum_X * self._real_BL[..., None]
        added_X = sum_X.double().sum((0, 1)).cpu()
        if name.startswith("heads"):
            added_X = added_X.view(self.scorer.model.config.num_attention_heads, -1).sum(1)
        self.sums[name] = self.sums.get(name, 0) + added_X

    def _begin(self, module: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        ids_BL, pad = inputs.get("input_ids"), self.scorer.model.config.pad_token_id
        self._real_BL = None if ids_BL is None or pad is None else ids_BL != pad

    def _of_output(self, module: nn.Module, args: Any, output: Any) -> None:
        self.add("hidden", output[0] if isinstance(output, tuple) else output)


def chosen(sums: Mapping[str, Tensor], sizes: Sizes) -> Kept:
    """The parts that do the most, of equals the first, in the order in which the model has them."""
    kept = {}
    for name, sum_X in sums.items():
        count = getattr(sizes, name.partition(".")[0])
        kept[name] = torch.sort(sum_X, descending=True, stable=True).indices[:count].sort().values
    return kept


def first_ones(sizes: Sizes, layers: int) -> Kept:
    """A choice of the right sizes, where weights do not matter."""
    kept = {"hidden": torch.arange(sizes.hidden)}
    for i in range(layers):
        kept |= {f"heads.{i}": torch.arange(sizes.heads), f"feed_forward.{i}": torch.arange(sizes.feed_forward)}
    return kept


def narrow(scorer: Kind, kept: Kept) -> Kind:
    """The scorer with only what is kept; the one that was given is used up. ZeRO-3 cannot have sharded it.

    Raises InputError where what comes behind the transformer cannot follow a cut of its hidden dimensions.
    """
    shape, hidden_D = scorer.model.config, kept["hidden"]
    before = Sizes.of(shape)
    sizes = Sizes(len(hidden_D), len(kept["heads.0"]), len(kept["feed_forward.0"]))
    if sizes.hidden < before.hidden:
        _narrow_behind(scorer, hidden_D)
    embeddings = scorer.backbone.embeddings
    for module in embeddings.children():
        if isinstance(module, nn.Embedding):
            _replace(module, "weight", 1, hidden_D)
            module.embedding_dim = sizes.hidden
    _norm(embeddings.LayerNorm, hidden_D)
    size = before.hidden // before.heads
    for i, layer in enumerate(_layers(scorer)):
        of_heads_D = (kept[f"heads.{i}"][:, None] * size + torch.arange(size)).flatten()
        attention = layer.attention.self
        attention.num_attention_heads, attention.all_head_size = sizes.heads, sizes.heads * size
        for linear in (attention.query, attention.key, attention.value):
            _linear(linear, of_heads_D, hidden_D)
        _linear(layer.attention.output.dense, hidden_D, of_heads_D)
        _linear(layer.intermediate.dense, kept[f"feed_forward.{i}"], hidden_D)
        _linear(layer.output.dense, hidden_D, kept[f"feed_forward.{i}"])
        _norm(layer.attention.output.LayerNorm, hidden_D)
        _norm(layer.output.LayerNorm, hidden_D)
    if getattr(scorer.backbone, "pooler", None) is not None:
        _linear(scorer.backbone.pooler.dense, hidden_D, hidden_D)
    shape.hidden_size, shape.num_attention_heads = sizes.hidden, sizes.heads
    shape.intermediate_size = sizes.feed_forward
    made = type(scorer)(scorer.chain, scorer.model, scorer.config, student=True)
    return made.train(scorer.training)


def _layers(scorer: Kind) -> list[Any]:
    return list(scorer.capture.layers)


def _narrow_behind(scorer: Kind, hidden_D: Tensor) -> None:
    from sentence_transformers.base.modules import Dense
    from sentence_transformers.sentence_transformer.modules import Pooling

    if scorer.reads_pairs:
        what = f"is of models that embed texts, and a {scorer.name} reads its score off all of its dimensions"
        raise InputError("student.width.hidden", what, "take hidden and heads out; feed_forward is cut in any")
    modules = list(scorer.chain)[1:]
    for i, module in enumerate(modules):
        if isinstance(module, Pooling) and module.get_embedding_dimension() == module.embedding_dimension:
            modules[i] = Pooling(len(hidden_D), module.pooling_mode, module.include_prompt)
        elif isinstance(module, Dense):
            _linear(module.linear, torch.arange(module.out_features), hidden_D)
            module.in_features = len(hidden_D)
            break
        elif type(module).__name__ not in ("Normalize", "Dropout", "MultiVectorMask"):
            what = f"is cut of a model whose {type(module).__name__} would have to be cut as well"
            raise InputError("student.width.hidden", what, "take hidden and heads out; feed_forward is cut in any")
    replace_modules(scorer.chain, modules)


def _linear(linear: nn.Linear, rows_X: Tensor, columns_X: Tensor) -> None:
    _replace(linear, "weight", 0, rows_X)
    _replace(linear, "weight", 1, columns_X)
    if linear.bias is not None:
        _replace(linear, "bias", 0, rows_X)
    linear.out_features, linear.in_features = len(rows_X), len(columns_X)


def _norm(norm: nn.LayerNorm, hidden_D: Tensor) -> None:
    _replace(norm, "weight", 0, hidden_D)
    _replace(norm, "bias", 0, hidden_D)
    norm.normalized_shape = (len(hidden_D),)


def _replace(module: nn.Module, name: str, dim: int, kept_X: Tensor) -> None:
    old = getattr(module, name)
    new = old.detach().index_select(dim, kept_X.to(old.device))
    setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))


def _of_input(importance: Importance, name: str) -> Any:
    def read(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        importance.add(name, inputs[0])

    return read
