"""What every kind of model declares, once, in its own file: nothing outside of `lead_ds/models/kinds` names a kind."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lead_ds.data.tokens.encoder import TextEncoder, Tokens
from lead_ds.errors import InputError
from lead_ds.models.backbone import Family, keep_layers, load_model
from lead_ds.models.chain import open_chain, save_chain
from lead_ds.models.scorer import Scorer
from lead_ds.settings.model import ModelConfig
from lead_ds.settings.registry import Registry

KINDS: Registry[type[Kind]] = Registry("lead_ds.kinds", "lead_ds.models.kinds")
"""Every kind by its name in the configuration; another package adds one through an entry point of this group."""


@dataclass(frozen=True)
class Use:
    """How models of a kind are named, found and used: for the card."""

    name: str
    library: str
    task: str
    tags: tuple[str, ...]
    example: str


def two_sided(reader: str) -> str:
    """The example of a kind whose queries and passages are encoded apart, by a class of sentence-transformers."""
    return f"""from sentence_transformers import {reader}
model = {reader}("this directory")
queries = model.encode_query(["what is late interaction?"])
passages = model.encode_document(["ColBERT compares every query token with every passage token."])
print(model.similarity(queries, passages))"""


class Kind(Scorer):
    """A kind of model: a class of scorers, with what the rest of the house may ask of it.

    Register it under its name: `@KINDS.register("my_kind")`.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[ModelConfig]]  # its section; `kind` is a Literal of its name
    use: ClassVar[Use]

    family: ClassVar[str] = "SentenceTransformer"  # the class of sentence-transformers that reads and writes it
    head: ClassVar[Family] = "base"  # which of transformers' heads its transformer has

    reads_pairs: ClassVar[bool] = (
        False  # a query and a passage as one text: relevance within a query's own passages only
    )
    gives_vectors: ClassVar[bool] = False  # one vector per text: encode, index and exact search work
    lens_form: ClassVar[Literal["scores", "vectors"] | None] = (
        None  # of a tuned lens; None: no one state per text to read
    )
    sparse: ClassVar[bool] = False  # vectors as wide as the vocabulary, mostly zeros: searched and kept as such
    can_be_student: ClassVar[bool] = True
    can_be_trained: ClassVar[bool] = True  # False: a frozen teacher only

    has_layers: ClassVar[bool] = True  # False: its one layer is its final state, and no loss can read layers of it

    @classmethod
    def claims(cls, path: str) -> int:
        """How surely a directory's files say that it is of this kind: 0 not at all, 1 where no other kind does, 2 they say so."""
        return 0

    @classmethod
    @abstractmethod
    def read_text(cls, config: Any) -> TextEncoder:
        """How a model with this configuration reads text. Raises InputError as `Reading.of` and `Reading.encoder`."""

    @classmethod
    def load(
        cls,
        config: Any,
        dtype: torch.dtype,
        *,
        depth: int | None = None,
        layers: Sequence[int] | None = None,
        student: bool = False,
        frozen: bool = False,
    ) -> Self:
        """A scorer in evaluation mode; sharded where an HfDeepSpeedConfig is active.

        depth: its first layers only; layers: these only, renumbered. student: what it lacks (a head) is initialised.
        frozen: it will not be trained, and so may lack nothing. Raises InputError for what cannot be loaded.
        """
        chain = open_chain(config, cls.family, cls.head)
        model = load_model(config, cls.head, dtype, depth, new_head=student)
        if layers is not None:
            keep_layers(model, layers, config.path)
        cls.complete(chain, model, config, frozen=frozen)
        for module in list(chain)[1:]:
            module.to(dtype)
        return cls.of_parts(chain, model, config, student=student).eval()

    @classmethod
    def of_parts(cls, chain: Any, model: Any, config: Any, *, student: bool) -> Self:
        """A scorer of modules that are loaded."""
        return cls(chain, model, config, student=student)

    @classmethod
    def complete(cls, chain: Any, model: Any, config: Any, *, frozen: bool) -> None:
        """Put the modules in place that the configuration names behind the transformer, and those that the kind needs."""

    @classmethod
    def skeleton(cls, config: Any, **how: Any) -> tuple[nn.Module, Any, int]:
        """Its modules without weights, from the configuration's files alone; its transformer among them; its features' width.

        For the memory plan: on the meta device. how: as `load` takes.
        """
        with torch.device("meta"):
            scorer = cls.load(config.model_copy(update={"weights": "random"}), torch.bfloat16, **how)
        return scorer, scorer.backbone, scorer.features_width

    @property
    def features_width(self) -> int:
        """Of the vectors that its relevance is made of."""
        return self.width

    @property
    def dim(self) -> int | None:
        """Of its vectors, the first so many dimensions are read; None: all."""
        return getattr(self.config, "dim", None)

    def cut(self, dim: int) -> None:
        """Give the first `dim` dimensions of every vector from now on. Raises InputError where it cannot."""
        raise InputError(
            self.config.path, f"a {self.name} is not read by the first dimensions of a vector", "leave dim out"
        )

    def project(self, weight_TD: Tensor) -> None:
        """Let a linear map be the last layer that its vectors go through. Raises InputError where it has none."""
        raise InputError(
            self.config.path, f"a {self.name} has no last layer of vectors", "set losses.embedding.keep: false"
        )

    @property
    def unit(self) -> bool:
        """Whether its vectors have length 1."""
        return False

    @property
    def by_cosine(self) -> bool:
        """Whether its vectors are compared by their cosine, and are not of length 1 by themselves."""
        return False

    def comparable(self, vectors_BD: Tensor) -> Tensor:
        """Final vectors as their inner products are to be taken: at length 1 where the model compares by cosine."""
        return nn.functional.normalize(vectors_BD, dim=-1) if self.by_cosine else vectors_BD

    def ranked(self, tokens: Tokens) -> Tensor:
        """`embed`, `comparable`."""
        return self.comparable(self.embed(tokens))

    @classmethod
    def settled(cls, config: Any) -> Any:
        """The settings of a model in a run, with what its files say of how it is compared."""
        return config

    @classmethod
    def features_of(cls, config: Any, width: int) -> tuple[int, int]:
        """Elements that one query and one passage leave behind, of every captured layer."""
        return width, width

    @classmethod
    def forwards(cls, config: Any, queries: int, passages: int, length: int | None = None) -> list[tuple[int, int]]:
        """(rows, tokens) of each forward over a batch, every text at its longest; `length` in place of the passages'."""
        asking = [(queries, config.query_length)]
        if getattr(config, "passages", "own") == "teacher":
            return asking
        return [*asking, (passages, length or config.passage_length)]

    @classmethod
    def longest(cls, config: Any) -> int:
        """Tokens of the longest row it reads."""
        return int(config.passage_length)

    @classmethod
    def reads(cls, config: Any) -> str:
        """How it reads texts and compares them, in a sentence or two of the card."""
        lengths = f"queries of up to {config.query_length} and passages of up to {config.passage_length} tokens"
        return f"Trained with {lengths}."

    @property
    def space(self) -> dict[str, Any]:
        """What has to be equal, beside the files, for vectors to live in one space."""
        return {"dimension": self.features_width}

    @classmethod
    def refuse_sparse(cls, path: str, what: str) -> None:
        """Raise InputError where its vectors are sparse: `what` would hold each as wide as the vocabulary."""
        if cls.sparse:
            remedy = "encode, index, search, evaluate and mine take the model itself"
            raise InputError(path, f"its vectors are sparse, and {what}", remedy)

    def embed(self, tokens: Tokens) -> Tensor:
        """Final vectors [B, D] of texts, of a kind that gives such; those of length 1 as float32 has it, whatever the dtype."""
        vectors_BD = self(tokens=tokens)
        if vectors_BD.dtype == torch.float32 or not self.unit:
            return vectors_BD
        return nn.functional.normalize(vectors_BD.float(), dim=-1)  # 16 bits round the length, too

    def vectors_of(self, states_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Final vectors [B, D] of final token states [B, L, D], of a kind that gives such."""
        raise NotImplementedError

    def save(self, folder: Path, encoder: TextEncoder, state: dict[str, Tensor]) -> dict[str, Any]:
        """Fill a directory that sentence-transformers reads in the same way; what it has no place for, for our record.

        state: the weights, whole, where the scorer's own may be sharded.
        """
        parts = [(self.model, "model."), *((module, f"behind.{i}.") for i, module in enumerate(self.behind))]
        save_chain(self.chain, str(folder), encoder.tokenizer, [(part, _under(state, at)) for part, at in parts])
        return {"kind": self.name, "scale": self.config.scale}

    def facts(self, encoder: TextEncoder) -> list[str]:
        """Lines of the card, such as "vector width: 384"."""
        return []


def new_layer(config: ModelConfig, key: str, width: int, have: int | None, *, frozen: bool) -> bool:
    """Whether a linear layer to `width` must be made; `have`: the width of the one that the model comes with.

    Raises InputError where that is another, and where a frozen model's would stay random.
    """
    if have is not None:
        if have != width:
            raise InputError(key, f"{width} requested of a model that comes with one to {have}", "take it out")
        return False
    if frozen and config.weights == "pretrained":
        what = f"is {width}, and the model at {config.path} has no such layer: a frozen teacher's would stay random"
        raise InputError(f"teacher.{key}", what, "take it out, or warm the teacher up with it first")
    return True


@contextmanager
def reading_at_most(tokenizer: Any, length: int) -> Iterator[None]:
    """While open, a tokenizer's files would say `length`: that far sentence-transformers reads what is saved with them."""
    kept = tokenizer.model_max_length
    tokenizer.model_max_length = length
    try:
        yield
    finally:
        tokenizer.model_max_length = kept


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}


def kinds_that(what: Literal["gives_vectors", "can_be_student", "can_be_trained"]) -> str:
    """Names of the kinds of which that is true, for a remedy."""
    return ", ".join(name for name in KINDS if getattr(KINDS[name], what))
