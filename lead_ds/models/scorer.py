"""What every model is here: something that gives layer features of queries and passages.

Dimensions: K selected layers, Q queries, P passages, N passages of each query, B rows, L tokens, D width.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lead_ds.data.reads import ModelBatch
from lead_ds.data.tokens.encoder import Tokens
from lead_ds.data.tokens.passes import Passes
from lead_ds.errors import InputError
from lead_ds.models.backbone import checkpoint_activations, is_decoder
from lead_ds.models.capture import LayerCapture, Reduce
from lead_ds.models.grad_cache import recomputed
from lead_ds.models.packing import packed_inputs, unpacked
from lead_ds.models.taps import AttentionTaps, tap_attention
from lead_ds.relevance import Features, Scale, pad_tokens
from lead_ds.settings.model import ModelConfig

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")

LayerReading = Callable[[Tensor, Sequence[Tensor], Sequence[int]], Tensor]
"""What layers are read through, such as a tuned lens: (what the model's own read-out makes of K layers and of the final state,
the K + 1 states that it read, the layers) -> what they say."""


@dataclass
class Output:
    """A scorer's answer for one batch."""

    final: Features  # K = 1: what the model serves
    layers: Features | None = None  # K = the requested layers, in that order
    taps_queries: AttentionTaps | None = None  # of the layers tapped, by layer
    taps_passages: AttentionTaps | None = None  # of a cross-encoder's pairs


class Scorer(nn.Module):
    """Base of all scorers: a chain of sentence-transformers' modules, its transformer captured layer by layer.

    Registered are `model`, the Hugging Face model as it is saved, and `behind`, the modules after it. The chain itself, which
    reads and writes the directory, refers to both.
    """

    scope: Literal["batch", "group"]
    chain: Any

    def __init__(self, chain: Any, model: Any, config: ModelConfig, *, student: bool = False) -> None:
        super().__init__()
        chain[0].model = model
        self.model = model
        self.behind = nn.ModuleList(list(chain)[1:])
        object.__setattr__(self, "chain", chain)  # not a child: its modules are, once
        self.config = config
        # A student is trained on what it will serve, whatever its layers are compared by.
        self.final_scale: Scale = "none" if student else config.scale
        self.width: int = int(model.config.get_text_config().hidden_size)
        self.capture = LayerCapture(self.backbone, config.path)
        parameters = inspect.signature(self.backbone.forward).parameters
        # Code of its own may name no more than that it takes what there is.
        open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self._accepts = frozenset({*parameters, *(_INPUTS if open_ended else ())})
        self.decoder = is_decoder(self.backbone.config)
        self.recompute = False  # GradCache: keep no activations of a batch's passes
        self.lens: LayerReading | None = None  # of a frozen teacher: what its layers are read through

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Checkpoints of before sentence-transformers' modules were used call their Dense layers `dense`."""
        behind = getattr(self, "behind", ())
        wanted = [f"{prefix}behind.{i}." for i, module in enumerate(behind) if list(module.parameters())]
        for i, new in enumerate(wanted):
            old = f"{prefix}dense.{i}."
            for key in [key for key in state_dict if key.startswith(old)]:
                state_dict[new + key.removeprefix(old)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def backbone(self) -> Any:
        """The transformer without its task head."""
        return self.model.base_model

    @property
    def num_layers(self) -> int:
        """How many transformer layers can be read."""
        return len(self.capture)

    @property
    def readable(self) -> list[int]:
        """The layers that can be requested, ascending: see `Teacher`."""
        return list(range(self.num_layers))

    def forward(
        self,
        batch: ModelBatch | None = None,
        layers: Sequence[int] = (),
        tap_layers: Sequence[int] = (),
        *,
        tokens: Tokens | None = None,
    ) -> Any:
        """`Output` of a batch; or, given `tokens`, what the model gives for these texts or pairs: of its final state, with
        `layers` of these and then the final state, stacked."""
        if tokens is not None:
            found = self._read(tokens, layers)
            return found if layers else found[-1]
        assert batch is not None
        return self._answer(batch, layers, tap_layers)

    @abstractmethod
    def _read(self, tokens: Tokens, layers: Sequence[int]) -> Tensor:
        """[K + 1, B, ...]: vectors, token states or scores of the requested layers, then of the final state."""

    @abstractmethod
    def _answer(self, batch: ModelBatch, layers: Sequence[int], tap_layers: Sequence[int]) -> Output:
        """Features of a batch's queries and passages, or pairs, and attention taps where some are requested."""

    def in_passes(self, passes: Passes, read: Callable[[Tokens], Tensor]) -> Tensor:
        """`read` of each pass (its dimension 1 are the rows of the pass), joined in the order of the batch."""
        again = self.recompute and torch.is_grad_enabled()
        said = [recomputed(read, tokens) if again else read(tokens) for tokens in passes.tokens]
        if said[0].dim() > 3:  # token states: [K, B, L, D]
            said = [pad_tokens(states, 2, said[0].shape[2]) for states in said]
        return torch.cat(said, 1).index_select(1, passes.order)

    def of_texts(self, batch: ModelBatch, layers: Sequence[int], tap_layers: Sequence[int]) -> Any:
        """`_read` of a batch's queries (of texts alone: none) and passages (where another model reads them: none), and the
        attention taps of both."""

        def read(tokens: Tokens) -> Tensor:
            return self._read(tokens, layers)

        if batch.passes is not None:
            count = (
                0 if batch.queries is None else len(batch.queries["input_ids"])
            )  # not what a module of your own gives
            found = self.in_passes(batch.passes, read)
            return found[:, :count], found[:, count:], None, None
        queries = taps_queries = None
        if batch.queries is not None:
            with self.tapping(tap_layers) as taps_queries:
                queries = read(batch.queries)
        if batch.passages is None:
            assert queries is not None
            return queries, queries[:, :0], taps_queries, None
        with self.tapping(tap_layers) as taps_passages:
            passages = read(batch.passages)
        return passages[:, :0] if queries is None else queries, passages, taps_queries, taps_passages

    @property
    def takes_positions(self) -> bool:
        """Whether the backbone takes the positions of tokens."""
        return "position_ids" in self._accepts

    def all_layers(self, tokens: Tokens) -> Tensor:
        """What it gives, without dropout, for texts or pairs from every layer, then from its final state."""
        device, training = next(self.parameters()).device, self.training
        moved = {name: x.to(device) for name, x in tokens.items()}
        said = self.eval()(tokens=moved, layers=list(range(self.num_layers)))
        self.train(training)
        return said

    def gradient_checkpointing_enable(self) -> None:
        """Recompute activations in the backward pass instead of keeping them; captured layers stay exact."""
        checkpoint_activations(self.model)

    def compile_layers(self, **settings: Any) -> None:
        """torch.compile each transformer layer on its own, so that capturing hooks stay outside of the graphs.

        Layers share their graphs: one for each of padded or not, one text or several, trained or not, before and after
        torch has learned that shapes vary. Those are more than the 8 after which torch would run layers uncompiled.
        """
        dynamo: Any = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
        for layer in self.capture.layers:
            layer.forward = torch.compile(layer.forward, **settings)

    @contextmanager
    def tapping(self, tap_layers: Sequence[int]) -> Iterator[AttentionTaps | None]:
        """Attention taps of `tap_layers` while open; None where there are none to take."""
        if not tap_layers:
            yield None
            return
        with tap_attention(self.backbone, tap_layers) as taps:
            yield taps

    def freeze_pooler(self) -> None:
        """A pooler that comes with the architecture stands beside the modules here and would never see a gradient."""
        pooler = getattr(self.model, "pooler", None)
        if isinstance(pooler, nn.Module):
            pooler.requires_grad_(False)

    def run(self, tokens: Tokens, layers: Sequence[int], reduce: Reduce, *, through_norm: bool) -> list[Tensor]:
        """`reduce` of each of `layers` and then of the model's final state: K + 1 tensors.

        `through_norm`: `reduce` wants the state after the final norm. False: `reduce` only picks tokens, so the norm is
        applied to the few that are left.
        """
        norm = self.capture.norm

        def in_hook(state_BLD: Tensor) -> Tensor:
            return reduce(unpacked(state_BLD if norm is None or not through_norm else norm(state_BLD), tokens))

        with self.capture.reading(layers, in_hook) as states:
            final_BLD = _last_state(self.backbone(**self._inputs(tokens)), self.config.path)
        read = [states[i] for i in layers]
        if norm is not None and not through_norm:
            read = [norm(state) for state in read]
        return [*read, reduce(unpacked(final_BLD, tokens))]

    def _inputs(self, tokens: Tokens) -> dict[str, Any]:
        inputs: dict[str, Any] = {name: x for name, x in tokens.items() if name in self._accepts}
        if "use_cache" in self._accepts:
            inputs["use_cache"] = False
        if "places" in tokens:
            inputs.pop("attention_mask", None)  # of the texts, not of the rows
            inputs |= packed_inputs(tokens, self.backbone, decoder=self.decoder)
        elif self.decoder and self.takes_positions:
            # A text has the same positions on whichever side it is padded.
            inputs["position_ids"] = (tokens["attention_mask"].long().cumsum(1) - 1).clamp_min(0)
        return inputs


def _last_state(output: Any, path: str) -> Tensor:
    """[B, L, D]: the token states among what a transformer gives, which code of its own may give as a dictionary or a tuple."""
    found = getattr(output, "last_hidden_state", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("last_hidden_state")
    if found is None and isinstance(output, (tuple, list)):
        found = output[0]
    if not isinstance(found, Tensor) or found.dim() != 3:
        names = ", ".join(map(str, output)) if isinstance(output, Mapping) else type(output).__name__
        what = f"its own code gives no states of tokens (last_hidden_state) but {names}"
        raise InputError(path, what, "of a frozen teacher, set placement: replicate; else cache or serve its vectors")
    return found
