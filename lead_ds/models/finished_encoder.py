"""A model whose own code gives finished vectors, or states that it finished itself (NV-Embed): read at its end alone.

Dimensions: B texts, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lead_ds.data.tokens.encoder import Tokens
from lead_ds.errors import InputError
from lead_ds.models.capture import Reduce
from lead_ds.models.chain import finished_output, replace_modules
from lead_ds.models.files import family_of
from lead_ds.models.vector_encoder import VectorEncoder

OUTPUT = "sentence_embeddings"  # as NV-Embed and its kin name it


class FinishedEncoder(VectorEncoder):
    """A frozen dual encoder without layers: no layer's state passes through what its code does to the last one."""

    has_layers = False
    can_be_student = False

    def __init__(self, chain: Any, model: Any, config: Any, *, student: bool, said: Tensor) -> None:
        from sentence_transformers.sentence_transformer.modules import Pooling

        self.__dict__["finished"] = said.dim() == 2
        if said.dim() == 2:  # nothing is left to pool: what stands for it tells the width
            modules = [module for module in list(chain)[1:] if not isinstance(module, Pooling)]
            replace_modules(chain, [Pooling(said.shape[-1], "mean"), *modules])
        elif family_of(config.path) is None and config.pooling == "auto":
            what = "its own code gives states of tokens, and no file says how they become one vector"
            raise InputError(config.path, what, "set pooling: mean, cls or last")
        super().__init__(chain, model, config, student=student)
        self.output = finished_output(config.path) or OUTPUT

    @property
    def num_layers(self) -> int:
        """None that can be read."""
        return 0

    @property
    def pooling(self) -> str:
        return "by its own code" if self.finished else super().pooling

    def run(self, tokens: Tokens, layers: Sequence[int], reduce: Reduce, *, through_norm: bool) -> list[Tensor]:
        """See `Scorer`: the final one alone."""
        if layers:
            raise InputError(self.config.path, "its own code finishes its vectors, and no layer can be read so")
        inputs = {name: x for name, x in self._inputs(tokens).items() if name != "pool_mask"}
        said = self.backbone(**inputs)[self.output]
        return [said if self.finished else reduce(said)]

    def vectors_of(self, states_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """See `Kind`: it has none."""
        raise InputError(self.config.path, "its own code finishes its vectors", "use its directory as it is")


@torch.no_grad()
def finished_by(model: nn.Module, path: str) -> Tensor | None:
    """What a model of its own code gives in place of token states for a text of two tokens: [1, D] or [1, L, D]; else None.

    None, too, of a model without weights, and of a sharded one, which cannot be asked as it is loaded.
    """
    parameter = next(model.parameters())
    if (
        not type(model).__module__.startswith("transformers_modules.")
        or parameter.is_meta
        or hasattr(parameter, "ds_id")
    ):
        return None
    ids = torch.tensor([[0, 1]], device=parameter.device)
    output = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    if not isinstance(output, Mapping) or "last_hidden_state" in output:
        return None
    said = output.get(finished_output(path) or OUTPUT)
    return said if isinstance(said, Tensor) and said.dim() in (2, 3) else None
