"""What a plan needs to know of a model: the sizes of its parameters. Read from a module on the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from lead_ds.models.special_weights import expert_blocks


@dataclass(frozen=True)
class Parameter:
    """One parameter: elements, whether it is trained, whether it is a matrix (which decides its optimizer group)."""

    name: str
    numel: int
    trainable: bool = True
    matrix: bool = True


@dataclass(frozen=True)
class ModelShape:
    """A model's parameters and the widths that its activations have."""

    parameters: tuple[Parameter, ...]
    layers: int
    width: int
    features: int  # width of one captured vector
    largest_layer: int  # elements of the largest transformer layer
    largest_other: int  # elements of the largest module outside the layers: mostly the embeddings
    largest_gather: int  # elements that ZeRO-3 gathers as one: a module's own, or all experts of a layer
    published: int  # parameters of the model as it was published, with heads and layers that are not loaded here
    published_layers: int  # layers of that model

    @classmethod
    def of(cls, module: nn.Module, layers: Sequence[nn.Module], *, features: int, published: int = 0) -> ModelShape:
        """The shape of a module (its parameters may be on the meta device) whose transformer layers are `layers`."""
        inside = {id(p) for layer in layers for p in layer.parameters()}
        parameters = tuple(Parameter(n, p.numel(), p.requires_grad, p.dim() > 1) for n, p in module.named_parameters())
        others = [
            sum(p.numel() for p in part.parameters(recurse=False) if id(p) not in inside) for part in module.modules()
        ]
        whole = [sum(p.numel() for p in block.parameters()) for block in expert_blocks(module)]
        own = [sum(p.numel() for p in part.parameters(recurse=False)) for part in module.modules()]
        total = sum(p.numel for p in parameters)
        return cls(
            parameters=parameters,
            layers=len(layers),
            width=int(getattr(module, "width", features)),
            features=features,
            largest_layer=max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=0),
            largest_other=max(others, default=0),
            largest_gather=max(own + whole, default=0),
            published=max(published, total),
            published_layers=len(layers),
        )

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(p.numel for p in self.parameters)

    @property
    def trainable(self) -> int:
        """Elements of the parameters that are trained."""
        return sum(p.numel for p in self.parameters if p.trainable)

    def frozen(self) -> ModelShape:
        """The same model, nothing of it trained."""
        return replace(self, parameters=tuple(replace(p, trainable=False) for p in self.parameters))
