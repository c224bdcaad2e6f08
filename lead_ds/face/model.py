"""A loaded model of any kind: its vectors, its scores, and both of them layer by layer.

Dimensions: T layers, n texts, D width of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from torch import Tensor

from lead_ds.data.groups.group import Group
from lead_ds.data.reads import read
from lead_ds.errors import InputError
from lead_ds.models.load import load_scorer
from lead_ds.retrieval.encode import Encoding, encode_share
from lead_ds.retrieval.rerank import Reranker as _Reranker

Side = Literal["queries", "passages"]


class Model:
    """A model in evaluation mode with its own tokenisation; `load` makes one.

    kind: the name of its kind. num_layers: how many layers can be read.
    section: what `Distiller` takes it by, `path`, `kind` and settings.

    >>> load(dual_encoder).num_layers
    3
    """

    def __init__(self, scorer: Any, encoder: Any, section: dict[str, Any]) -> None:
        self.scorer, self.encoder, self.section = scorer, encoder, section

    @property
    def path(self) -> str:
        """The directory or hub name that it was loaded from."""
        return str(self.scorer.config.path)

    @property
    def kind(self) -> str:
        """Its kind."""
        return str(self.scorer.name)

    @property
    def num_layers(self) -> int:
        """T."""
        return int(self.scorer.num_layers)

    def __repr__(self) -> str:
        return f"<{self.kind} {self.path}, {self.num_layers} layers>"

    def encode(self, texts: Sequence[str], side: Side = "passages", *, batch_size: int = 64) -> Tensor:
        """Vectors [n, D] of texts, float32 on the CPU. side: passages or queries, which may have prompts of their own.

        Raises InputError for a model that gives no vector per text.

        >>> model = load(dual_encoder)
        >>> model.encode(["a glacier", "an owl"]).shape
        torch.Size([2, 16])
        """
        _side(side)
        if not self.scorer.gives_vectors:
            raise InputError(self.path, f"a {self.kind} gives no vector of a text", "use score")
        if not texts:
            return torch.empty(0, int(self.scorer.features_width))
        device = next(self.scorer.parameters()).device
        kind: Literal["queries", "corpus"] = "queries" if side == "queries" else "corpus"
        rows = range(len(texts))

        def at(rows: Sequence[int]) -> list[str]:
            return [texts[row] for row in rows]

        return encode_share(self.scorer.embed, self.encoder, kind, at, rows, Encoding(batch_size, device)).cpu()

    def score(self, query: str, passages: Sequence[str], *, batch_size: int = 64) -> list[float]:
        """The relevance of each passage to the query.

        >>> load(cross_encoder, max_length=64).score("who flies silently", ["an owl", "a glacier"])  # doctest: +ELLIPSIS
        [..., ...]
        """
        return _Reranker(self.scorer, self.encoder).scores(query, passages, batch_size)

    def layers(self, query: str, passages: Sequence[str]) -> Tensor:
        """The relevance [T + 1, n] of each passage to the query, read from every layer and then from the final state.

        All passages are read in one batch. A dual encoder's and a ColBERT's follow the setting `scale`.

        >>> load(dual_encoder).layers("who flies silently", ["an owl", "a glacier"]).shape
        torch.Size([4, 2])
        """
        output = self._read(query, passages)
        parts = [features for features in (output.layers, output.final) if features is not None]
        with torch.no_grad():
            return torch.cat([part.group_relevance(len(passages)).logits[:, 0].float().cpu() for part in parts])

    def _read(self, query: str, passages: Sequence[str]) -> Any:
        none = np.empty(0, np.int64)
        group = Group("", query, [""] * len(passages), list(passages), none, none)
        batch = read(self.encoder, [group]).to(next(self.scorer.parameters()).device)
        with torch.no_grad():
            return self.scorer(batch, layers=list(range(self.num_layers)))


def load(
    path: str | Path, *, kind: str | None = None, device: str | torch.device | None = None, **settings: Any
) -> Model:
    """The model of a directory or hub name, in evaluation mode on `device` (default: CUDA where there is one).

    kind: one of `KINDS`; None: what its files say. settings: of a configuration's
    section for that kind, such as passage_length=256 or query_prompt="query: ". Raises InputError for what is not a
    model, for one of another kind, and for a setting that the kind has not.

    >>> load(dual_encoder, passage_length=64)  # doctest: +ELLIPSIS
    <dual_encoder ...student, 3 layers>
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    path = str(Path(path).expanduser()) if str(path).startswith("~") else str(path)
    scorer, encoder = load_scorer(path, kind, [f"{name}={_text(value)}" for name, value in settings.items()], device)
    return Model(scorer.to(device).eval(), encoder, {"path": path, "kind": str(scorer.name), **settings})


def as_model(model: Model | str | Path) -> Model:
    """A model, loaded where it is a path."""
    return model if isinstance(model, Model) else load(model)


def _side(side: str) -> None:
    if side not in ("queries", "passages"):
        raise InputError("side", f"{side!r} is neither", "use queries or passages")


def _text(value: Any) -> str:
    """A value as an override on the command line writes it."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
