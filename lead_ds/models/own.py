"""A torch module of your own as a dual encoder: it makes a vector of a text, and may expose its layers.

Dimensions: K selected layers, B texts, D width of a vector.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lead_ds.data.tokens.encoder import Tokens
from lead_ds.errors import InputError
from lead_ds.models.vector_encoder import VectorEncoder
from lead_ds.relevance import Scale

Side = Literal["queries", "passages"]
Tokenize = Callable[[Sequence[str], Side], dict[str, Tensor]]
WEIGHTS = "model.safetensors"
SHAPE = (
    "forward(tokens) gives vectors [B, D], or these and a list of each layer's vectors [B, D']; tokenize(texts, side) gives "
    "tensors by name"
)


class OwnText:
    """How a module of your own reads text, as the rest of the house asks for it. Picklable where the module's tokenize is."""

    kind = "dual_encoder"
    reads_pairs = scores_tokens = False
    tokenizer = None
    query_prompt = passage_prompt = ""
    query_length = passage_length = 512  # for the size of batches: the module itself cuts texts

    def __init__(self, path: str, tokenize: Tokenize, weights: str | None = None) -> None:
        """weights: a checksum of the module's, where they decide what a run learns."""
        self.path, self._tokenize, self.weights = path, tokenize, weights

    def queries(self, texts: Sequence[str], length: int | None = None) -> Tokens:
        """Its tokens of queries."""
        return self._tokenize(list(texts), "queries")

    def passages(self, texts: Sequence[str], length: int | None = None) -> Tokens:
        """Its tokens of passages."""
        return self._tokenize(list(texts), "passages")

    def alone(self, texts: Sequence[str], asking: Sequence[bool]) -> Tokens:
        """Its tokens of texts alone, of one role. Raises InputError for a batch of both: who knows how to join them."""
        if any(asking) and not all(asking):
            what = "a batch has queries and passages, which a module of your own tokenises apart"
            raise InputError("data.role", what, "set it, or give texts of one role")
        return self._tokenize(list(texts), "queries" if asking[0] else "passages")

    def rows(self, texts: Sequence[str], kind: Side) -> tuple[list[_Text], None]:
        """Texts, to be put into batches by their number of words."""
        return [_Text(text, kind) for text in texts], None

    def padded(self, rows: Sequence[_Text], types: object = None, length: int = 0) -> Tokens:
        """Its tokens of some of `rows`."""
        return self._tokenize([row.text for row in rows], rows[0].side)

    query_tokens = passage_tokens = padded

    def serving(self) -> OwnText:
        """Itself: it knows no other lengths for training."""
        return self

    def reads_like(self, other: object) -> bool:
        """Whether both give every text the same tokens: who knows."""
        return False


class _Text(list[str]):
    """A text in place of its tokens: its words."""

    def __init__(self, text: str, side: Side) -> None:
        super().__init__(text.split(" "))
        self.text, self.side = text, side


class _NoCapture:
    def uninstall(self) -> None:
        """There are no hooks."""


class OwnEncoder(VectorEncoder):
    """A dual encoder whose vectors, of every layer and final, a module of your own makes.

    config: a dual encoder's section, of which dtype and scale are read. Raises InputError for a module that cannot be one.
    """

    pooling = "its own"  # type: ignore[assignment]
    normalize = False  # type: ignore[assignment]
    truncate, similarity = None, "dot"  # type: ignore[assignment]

    def __init__(self, module: nn.Module, config: Any, *, student: bool = False) -> None:
        nn.Module.__init__(self)
        self.model, self.config, self._student = module, config, student
        self.capture = _NoCapture()  # type: ignore[assignment]
        self.recompute, self.lens, self.decoder = False, None, False
        final, layers = probe(module)
        self.width, self._layers = final.shape[-1], len(layers)

    @property
    def backbone(self) -> Any:
        return self.model

    @property
    def num_layers(self) -> int:
        return self._layers

    @property
    def vector_width(self) -> int:
        return int(self.width)

    @property
    def features_width(self) -> int:
        return int(self.width)

    @property
    def final_scale(self) -> Scale:  # type: ignore[override]
        """A student is trained on what it will serve, whatever its layers are compared by."""
        return "none" if self._student else self.config.scale

    def _read(self, tokens: Tokens, layers: Sequence[int]) -> Tensor:
        final_BD, all_layers = read(self.model, tokens)
        chosen = [all_layers[layer] for layer in layers]
        if any(layer.shape != final_BD.shape for layer in chosen):
            shapes = ", ".join(str(tuple(layer.shape)) for layer in chosen)
            raise InputError(
                _name(self.model), f"layers are {shapes}, vectors {tuple(final_BD.shape)}", "make them equal"
            )
        return torch.stack([*chosen, final_BD])

    def cut(self, dim: int) -> None:
        """Raises InputError: the module itself decides."""
        raise InputError(_name(self.model), "is your own module: its vectors cannot be cut", "leave dim out")

    def project(self, weight_TD: Tensor) -> None:
        """Raises InputError: the module itself decides."""
        raise InputError(
            _name(self.model), "is your own module: no layer can be added behind it", "set losses.embedding.keep: false"
        )

    def tapping(self, tap_layers: Sequence[int]) -> Any:
        """Raises InputError where attention maps are requested."""
        if tap_layers:
            raise InputError(_name(self.model), "has no attention maps to read", "set losses.attention.weight=0")
        return super().tapping(())

    def gradient_checkpointing_enable(self) -> None:
        """The module's own."""
        if not hasattr(self.model, "gradient_checkpointing_enable"):
            what = f"{_name(self.model)} has no gradient_checkpointing_enable"
            raise InputError("train.gradient_checkpointing", what, "add the method, or set it to false")
        self.model.gradient_checkpointing_enable()

    def compile_layers(self, **settings: Any) -> None:
        """torch.compile the whole module."""
        self.model.compile(**settings)

    def save(self, folder: Path, encoder: object, state: dict[str, Tensor]) -> dict[str, Any]:
        """Fill a directory with its weights, by the names that its state_dict has."""
        from safetensors.torch import save_file

        own = {key.removeprefix("model."): x.contiguous() for key, x in state.items()}
        save_file(own, str(folder / WEIGHTS), metadata={"format": "pt"})
        return {"kind": "module", "class": _name(self.model)}

    def card(self) -> str:
        """The text of README.md."""
        name = _name(self.model)
        return _CARD.format(name=name, file=WEIGHTS)


_CARD = """# A student of the class `{name}`

Trained by lead-ds. The weights are in {file}, by the names of the module's `state_dict`:

```python
from safetensors.torch import load_model
model = {name}(...)
load_model(model, "this directory/{file}")
```
"""


def probe(module: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """What a module makes of two texts. Raises InputError for one that is not an encoder of texts."""
    if not isinstance(module, nn.Module) or not callable(getattr(module, "tokenize", None)):
        raise InputError(_name(module), "has no tokenize", f"{SHAPE}")
    training, device = module.training, next(module.parameters()).device
    tokens = module.tokenize(["a text", "another one"], "passages")  # type: ignore[operator]
    if not isinstance(tokens, dict) or not all(isinstance(x, Tensor) and len(x) == 2 for x in tokens.values()):
        raise InputError(_name(module), "tokenize gives no dictionary of tensors with a row for each text", SHAPE)
    with torch.no_grad():
        final_BD, layers = read(module.eval(), {name: x.to(device) for name, x in tokens.items()})
    module.train(training)
    return final_BD, layers


def read(module: nn.Module, tokens: Tokens) -> tuple[Tensor, list[Tensor]]:
    """Final vectors [B, D] and those of layers. Raises InputError where a module gives something else."""
    found = module(tokens)
    final_BD, layers = (found, []) if isinstance(found, Tensor) else found
    if not all(isinstance(x, Tensor) and x.ndim == 2 for x in (final_BD, *layers)):
        raise InputError(_name(module), "forward gives something else than vectors", SHAPE)
    return final_BD, list(layers)


def checksum_of(module: nn.Module) -> str:
    """A checksum of a module's weights and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, x in module.state_dict().items():
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def copied(module: nn.Module) -> nn.Module:
    """A copy to train, so that the module itself is left alone. Raises InputError where it cannot be copied."""
    try:
        return copy.deepcopy(module)
    except Exception as error:
        what = f"cannot be copied: {type(error).__name__}: {error}"
        raise InputError(
            _name(module), what, "training works on a copy: keep locks and open files out of it"
        ) from error


def load_weights(module: nn.Module, folder: Path) -> None:
    """Put the weights that a run saved into a module."""
    from safetensors.torch import load_model

    load_model(module, str(folder / WEIGHTS))


def _name(module: object) -> str:
    return type(module).__name__
