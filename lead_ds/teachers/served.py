"""A teacher that another program serves by HTTP: vectors of texts, or scores of a query's passages. Its weights are not here.

Dimensions: A micro-batches of B queries, N passages of each, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from lead_ds.data.groups.group import Group, Groups
from lead_ds.data.reads import ModelBatch, Reads
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.errors import InputError
from lead_ds.io.facts import digest
from lead_ds.io.mapped import cache_dir
from lead_ds.relevance import ScoreFeatures, VectorFeatures
from lead_ds.settings.base import PACE, PLACE, Place, Positive
from lead_ds.teachers.served_answers import Answers, folder_of
from lead_ds.teachers.served_client import Client, Questions
from lead_ds.teachers.teacher import TEACHERS, Gift, Lesson, Teacher, TeacherSettings, TeacherView

_SECRET = ("key", "token", "authorization", "password", "secret")


class ServedSettings(TeacherSettings):
    """Settings of a served teacher."""

    kind: Literal["served"]
    api: Literal["embeddings", "tei", "cohere", "jina", "vllm"] = Field(
        description="embeddings: OpenAI's, vectors of texts; tei, cohere, jina: their rerank; vllm: its score"
    )
    url: Annotated[str, PLACE] = Field(description="the whole address, such as http://localhost:8000/v1/embeddings")
    model: str | None = Field(None, description="the model's name there; tei serves one, and needs none")
    key_variable: Annotated[str | None, PLACE] = Field(
        None, description="the environment variable that holds the key; the key itself is written nowhere"
    )
    query_prompt: str | None = Field(None, description="put before a query, as the model's card says")
    passage_prompt: str | None = None
    extra: dict[str, Any] = Field({}, description="more of a request's JSON, such as {truncate: true, dimensions: 256}")
    scale: Literal["none", "cosine", "standard"] = Field("none", description="of relevance; cosine: embeddings only")
    answers: Annotated[Place | None, PLACE] = Field(
        None, description="the folder of its answers; null: one of the model's in the cache folder, for every run"
    )
    request_size: Annotated[Positive, PACE] = Field(32, description="texts, or passages of a query, of a request")
    concurrent: Annotated[Positive, PACE] = Field(8, description="requests at once, of each process")
    timeout: Annotated[float, PACE] = Field(60.0, gt=0, allow_inf_nan=False, description="seconds of one request")
    tries: Annotated[Positive, PACE] = Field(8, description="of each request, while the server is busy or broken")
    pause: Annotated[float, PACE] = Field(
        1.0, ge=0, allow_inf_nan=False, description="seconds before the second try; twice as many before each other"
    )

    @field_validator("url")
    @classmethod
    def _url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError("is not an address: http://HOST:PORT/PATH")
        if "@" in parts.netloc or any(word in (parts.query + parts.fragment).lower() for word in _SECRET):
            raise _secret("holds a key, which would be written down")
        return value

    @field_validator("key_variable")
    @classmethod
    def _variable(cls, value: str | None) -> str | None:
        if value is not None and not value.isidentifier():
            raise _secret("is no name of a variable")
        return value

    @field_validator("extra")
    @classmethod
    def _extra(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in _names(value):
            if any(word in name.lower() for word in _SECRET) and "tokens" not in name.lower():
                raise ValueError(f"{name} looks like a key, which would be written down: set key_variable")
        if value.get("output_dtype", "float") != "float":
            raise ValueError("output_dtype: vectors are read as floats: take it out")
        return value

    @model_validator(mode="after")
    def _check(self) -> ServedSettings:
        if self.scale == "cosine" and self.api != "embeddings":
            raise ValueError(
                "scale: cosine is of vectors: scores are taken as they are (none) or as z-scores (standard)"
            )
        if self.model is None and self.api != "tei":
            raise ValueError(f"model is missing: {self.api} needs the model's name")
        if self.model is not None and self.api == "tei":
            raise ValueError("model is ignored by tei, which serves one: take it out")
        return self


def _secret(what: str) -> PydanticCustomError:
    """An error that does not repeat what was given, which may be a key."""
    return PydanticCustomError("secret", what, {"remedy": "name the variable that holds the key in key_variable"})  # type: ignore[arg-type]


def _names(tree: Any) -> Iterator[str]:
    """Every key in a tree of JSON."""
    if isinstance(tree, dict):
        yield from map(str, tree)
    for inner in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _names(inner)


class ServedLookup:
    """Answers to a group's texts: kept ones, and the server's. Picklable: worker processes ask."""

    reads_texts = True

    def __init__(self, settings: ServedSettings) -> None:
        self.settings = settings
        facts = {name: getattr(settings, name) for name in ("api", "model", "extra")}
        folder = folder_of(settings, cache_dir(), digest({**facts, "url": settings.url}))
        self.answers = Answers(folder, facts)

    @property
    def vectors(self) -> bool:
        """Whether it is vectors that are served, and not scores."""
        return self.settings.api == "embeddings"

    def read(self, rows: np.ndarray, groups: Sequence[Group]) -> dict[str, np.ndarray]:
        """queries [1, Q, D] and passages [1, Q N, D], or scores [Q, N]; float32. Raises as `Client.ask`.

        Texts alone are passages, read as their roles say.
        """
        if groups[0].role is not None:
            prompts = {"query": self.settings.query_prompt, "passage": self.settings.passage_prompt}
            alone = [((prompts[group.role or "passage"] or "") + group.passages[0],) for group in groups]
            answered = self.asked(alone)
            vectors = np.stack([answered[text] for text in alone])[None]
            return {"queries": vectors[:, :0], "passages": vectors}
        queries = [group.query for group in groups]
        pairs = [(group.query, text) for group in groups for text in group.passages]
        questions = self.questions(queries, pairs)
        found = self.asked(questions)
        answers = np.stack([found[question] for question in questions])
        if self.vectors:
            return {"queries": answers[None, : len(queries)], "passages": answers[None, len(queries) :]}
        return {"scores": answers.reshape(len(queries), -1)}

    def questions(self, queries: Sequence[str], pairs: Questions) -> Questions:
        """What is asked of queries and (query, passage) pairs: the texts, queries first, or the pairs; with prompts."""
        ask, read = self.settings.query_prompt or "", self.settings.passage_prompt or ""
        if self.vectors:
            return [*((ask + query,) for query in queries), *((read + text,) for _, text in pairs)]
        return [(ask + query, read + text) for query, text in pairs]

    def asked(self, questions: Questions) -> Mapping[tuple[str, ...], np.ndarray]:
        """The answers to questions; the server is asked what is not known."""
        wanted = list(dict.fromkeys(questions))
        found = self.answers.read(wanted)
        if missing := [question for question in wanted if question not in found]:
            Client(self.settings).ask(missing, self.answers.keep)
            found |= self.answers.read(missing)  # of two processes that asked the same, the first one's
        return found


@TEACHERS.register("served")
class ServedTeacher(Teacher):
    """A model behind an address: its vectors, or its scores of each query's own passages; no layers."""

    Settings = ServedSettings
    gives = frozenset({"final", "features"})
    reads_alone = True
    num_layers, placement = 0, "served"

    def __init__(self, lookup: ServedLookup, device: torch.device) -> None:
        self.lookup, self.device = lookup, device

    @classmethod
    def given(cls, settings: ServedSettings) -> frozenset[Gift]:
        """See `Teacher`: vectors or scores, by the interface."""
        return cls.gives if settings.api == "embeddings" else cls.gives - {"features"}

    @classmethod
    def address(cls, settings: ServedSettings) -> str:
        """See `Teacher`."""
        return settings.url

    @classmethod
    def reads(cls, lesson: Lesson, groups: Groups, ranks: Ranks) -> Reads:
        """See `Teacher`: answers to the texts of each group. The first question is asked here, by one process."""
        lookup = ServedLookup(lesson.teacher)
        if not lookup.vectors and lesson.data.negatives == 0:
            what = "is 0: scores are compared over a query's own passages, and there is but one"
            raise InputError("data.negatives", what, "set it to 1 or more")
        if not lookup.vectors and "features" in lesson.losses.needs:
            what = f"{lesson.teacher.api} serves scores, and a loss reads vectors"
            raise InputError("teacher.api", what, "serve embeddings, or set that loss's weight to 0")
        Client(lesson.teacher).key()
        lookup.answers.begin()
        if ranks.main:
            lookup.read(np.zeros(1, int), [groups.draw(0, lesson.seed, 0)])
        return Reads(lookup=lookup)

    @classmethod
    def open(cls, lesson: Lesson, reads: Reads, sample: Callable[[], list[ModelBatch]], ranks: Ranks) -> ServedTeacher:
        assert isinstance(reads.lookup, ServedLookup)
        return cls(reads.lookup, ranks.device)

    def window(
        self, chunks: Sequence[ModelBatch], layers: Sequence[int], tap_layers: Sequence[int] = ()
    ) -> TeacherView:
        """Vectors of a window's texts [1, A * B, D] and [1, A * B * N, D], or scores [1, A * B, N]; float32."""
        found = [chunk.to(self.device).looked_up or {} for chunk in chunks]
        scale = self.lookup.settings.scale
        if not self.lookup.vectors:
            return TeacherView(ScoreFeatures(torch.cat([one["scores"] for one in found])[None], scale))
        queries, passages = (torch.cat([one[name] for one in found], 1) for name in ("queries", "passages"))
        return TeacherView(VectorFeatures(queries, passages, scale))

    def describe(self) -> str:
        settings = self.lookup.settings
        return f"teacher {settings.model or settings.api} at {settings.url}: answers are kept in {self.folder}"

    @property
    def folder(self) -> Path:
        """Where its answers are."""
        return self.lookup.answers.folder

    def facts(self) -> dict[str, Any]:
        settings = self.lookup.settings
        return {
            "placement": self.placement,
            "kind": "served",
            "path": settings.url,
            "model": settings.model,
            "api": settings.api,
            "answers": str(self.folder),
            "parameter_bytes": 0,
        }
