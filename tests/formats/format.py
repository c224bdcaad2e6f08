"""What a format is, and how its directories are written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.models.tiny_models import tiny_model

Scores = Callable[[str, list[str], list[str]], Tensor]


@dataclass(frozen=True)
class Format:
    """A way in which models are kept. write: fills a folder and returns the path to read.

    refused: what the one line says where the format is not read: everywhere, or as a student alone (not_as_student).
    reference: scores of pairs, or vectors of texts (of both sides alike), by the card's code; None: the class of
    sentence-transformers that its files name.
    """

    name: str
    write: Callable[[Path], str]
    kind: str | None = None
    settings: tuple[str, ...] = ()
    refused: str | None = None
    reference: Scores | None = None
    source: str = "sentence-transformers 6"
    not_as_student: bool = False
    pairs: bool = False  # a model of pairs, which `encode` does not read


FORMATS: dict[str, Format] = {}


def a_format(name: str, **more: Any) -> Callable[[Callable[[Path], str]], Callable[[Path], str]]:
    """A decorator: what it stands on writes the format."""

    def add(write: Callable[[Path], str]) -> Callable[[Path], str]:
        assert name not in FORMATS, name
        FORMATS[name] = Format(name, write, **more)
        return write

    return add


def saved(folder: Path, family: str, *behind: nn.Module, **more: Any) -> str:
    """A tiny transformer with modules behind it, as the installed sentence-transformers saves it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

    shape = more.pop("shape", {})
    path = tiny_model(folder / "origin", family, **({"layers": 2} | shape))
    offset = {"max_seq_length": 128} if family in ("roberta", "xlm-roberta", "mpnet") else {}  # positions begin at 2
    reader = Transformer(path, **offset, **more.pop("reader", {}))
    if reader.tokenizer.pad_token is None:
        reader.tokenizer.pad_token = reader.tokenizer.eos_token
    SentenceTransformer(modules=[reader, *behind], **more).save_pretrained(
        str(folder / "saved"), create_model_card=False
    )
    return str(folder / "saved")


def pool(mode: Any = "mean", width: int = 32, **more: Any) -> nn.Module:
    """sentence-transformers' pooling."""
    from sentence_transformers.sentence_transformer.modules import Pooling

    return Pooling(width, mode, **more)


def unit() -> nn.Module:
    """sentence-transformers' Normalize."""
    from sentence_transformers.base.modules import Normalize

    return Normalize()


def dense(into: int, out: int, activation: nn.Module | None = None, **more: Any) -> nn.Module:
    """sentence-transformers' Dense, its weights drawn anew."""
    from sentence_transformers.base.modules import Dense

    torch.manual_seed(into * 1000 + out)
    return Dense(into, out, activation_function=activation or nn.Tanh(), **more)


def put(folder: str | Path, name: str, tree: Any) -> str:
    """Write a JSON file of a directory; returns the directory."""
    file = Path(folder) / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(tree))
    return str(folder)


def change(folder: str | Path, name: str, **keys: Any) -> str:
    """Set keys of a JSON file; None: take a key out. Returns the directory."""
    tree = json.loads((Path(folder) / name).read_text())
    return put(folder, name, {key: value for key, value in (tree | keys).items() if value is not None})
