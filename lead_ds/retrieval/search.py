"""Ask for passages: of an index, or of a dataset encoded on the spot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lead_ds.data.collections.dataset import Dataset
from lead_ds.data.collections.qrels import Run
from lead_ds.data.collections.texts import Texts
from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.errors import InputError
from lead_ds.io.files import model_checksum
from lead_ds.io.progress import progress
from lead_ds.models.kinds.kind import Kind
from lead_ds.models.router import Reader, check_space
from lead_ds.retrieval.encode import Encoding, Side, encode_share
from lead_ds.retrieval.encoded import AT_ONCE, make_run
from lead_ds.retrieval.evaluate import ModelLike, Task, open_encoder, score_each
from lead_ds.retrieval.exact import exact_search
from lead_ds.retrieval.identical import Judged, each_without_identical, with_spare
from lead_ds.retrieval.index import Index
from lead_ds.retrieval.indexed import Indexed, check_k
from lead_ds.retrieval.metrics import Scores, depth
from lead_ds.retrieval.sparse import SparseVectors
from lead_ds.retrieval.vectors import check_texts


@dataclass(frozen=True)
class Hit:
    """A passage that was found: its id, its score (inner product) and its text ("" without a dataset)."""

    id: str
    score: float
    text: str


def model_facts(path: str | Path, scorer: Kind) -> dict[str, Any]:
    """What has to be equal for vectors to live in one space: the model's files, pooling, normalisation and width."""
    return {"checksum": model_checksum(path), **scorer.space}


class Corpus(Protocol):
    """Passages by row: `Texts`, or some in memory."""

    @property
    def ids(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def rows(self, names: Sequence[str]) -> np.ndarray: ...
    def text(self, row: int) -> str: ...
    def texts(self, rows: Sequence[int]) -> list[str]: ...


class Searcher:
    """A dual encoder with passages to search in: the vectors of a dataset, exactly, or an index."""

    def __init__(
        self,
        scorer: Kind,
        encoder: TextEncoder,
        passages: Tensor | SparseVectors | Indexed,
        ids: Sequence[str],
        corpus: Corpus | None,
    ) -> None:
        self.scorer, self.encoder, self.passages, self.ids, self.corpus = scorer, encoder, passages, ids, corpus
        self.device = next(scorer.parameters()).device

    @classmethod
    def open(
        cls,
        model: ModelLike,
        data: str | Path | None = None,
        *,
        index: str | Path | None = None,
        batch_size: int = 64,
        device: str | None = None,
        quiet: bool = False,
        document_model: ModelLike | None = None,
        **index_settings: Any,
    ) -> Searcher:
        """Load a model with an index (`index_settings` of `Index.open`), or encode the corpus of `data` now.

        With an index, `data` gives the hits their texts, and the model is read by as many dimensions as the index has.
        document_model: what encodes, or encoded, the passages, where that is another model; only
        its files are looked at where there is an index. Raises InputError when neither is given, and when the index was
        made by another model, with another prompt, or of other texts.
        """
        if data is None and index is None:
            raise InputError("search", "needs an index or a dataset", "give one of them")
        scorer, encoder = open_encoder(model, device)
        corpus = None if data is None else Dataset.open(data).corpus
        if index is not None:
            opened = Index.open(index, **index_settings)
            assert document_model is None or isinstance(document_model, (str, Path))
            return cls.over_index(scorer, encoder, scorer.config.path, opened, corpus, document_model)
        assert corpus is not None
        documents = None if document_model is None else open_encoder(document_model, device, scorer.dim)
        return cls.over_corpus(scorer, encoder, corpus, batch_size=batch_size, quiet=quiet, documents=documents)

    @classmethod
    def over_index(
        cls,
        scorer: Kind,
        encoder: TextEncoder,
        path: str | Path,
        index: Indexed,
        corpus: Texts | None,
        document_model: str | Path | None = None,
    ) -> Searcher:
        """The model loaded from `path` over an index. Raises InputError as `open`."""
        facts, width = model_facts(path, scorer), index.meta["dimension"]
        if scorer.dim not in (None, width):
            what = f"is {scorer.dim}, and {index.folder} has vectors of {width} dimensions"
            raise InputError("dim", what, "leave it out: an index is read at its own width; encode --dim makes another")
        asks = index.meta.get("queries") == facts  # the index was made for its queries
        own = index.meta["model"] == {**facts, "dimension": width}
        if scorer.dim is None and width < facts["dimension"] and (own or document_model is not None):
            scorer.cut(width)  # an index of first dimensions
            facts["dimension"] = width
        if document_model is not None:
            index.check_two(facts, model_checksum(document_model))
        elif not asks:
            index.check_model(facts)
            index.check_side(Side.of(encoder, "corpus"))
        if corpus is not None:
            check_texts(index.meta, corpus, index.folder)
        return cls(scorer, encoder, index, index.ids, corpus)

    @classmethod
    def over_corpus(
        cls,
        scorer: Kind,
        encoder: TextEncoder,
        corpus: Corpus,
        *,
        batch_size: int = 64,
        quiet: bool = False,
        documents: Reader | None = None,
    ) -> Searcher:
        """The model over passages that are encoded now, by `documents` where that is another model; searched exactly."""
        reads, text = documents or (scorer, encoder)
        check_space((scorer, encoder), (reads, text))
        with progress("encoding the corpus", len(corpus), "texts", shown=not quiet) as meter:
            vectors_PD = encode_share(
                reads.ranked,
                text,
                "corpus",
                corpus.texts,
                range(len(corpus)),
                Encoding(batch_size, next(scorer.parameters()).device),
                meter=meter,
            )
        return cls(scorer, encoder, vectors_PD, corpus.ids, corpus)

    def search(self, query: str, k: int | None = None) -> list[Hit]:
        """The k best passages for one query, best first. k: 10 by default, or all where there are fewer."""
        run = self.run(["query"], [query], min(10, len(self.ids)) if k is None else k)["query"]
        if self.corpus is None:
            return [Hit(name, score, "") for name, score in run.items()]
        rows = self.corpus.rows(list(run))
        texts = [self.corpus.text(int(row)) if row >= 0 else "" for row in rows]
        return [Hit(name, score, text) for (name, score), text in zip(run.items(), texts, strict=True)]

    def run(self, query_ids: Sequence[str], queries: Sequence[str], k: int | None = None, **how: Any) -> Run:
        """The k best passages of every query: query id -> passage id -> score, best first. `how`: of `runs`, see which."""
        return {query: found for run in self.runs(query_ids, queries, k, **how) for query, found in run.items()}

    def runs(
        self,
        query_ids: Sequence[str],
        queries: Sequence[str],
        k: int | None = None,
        *,
        batch_size: int = 64,
        quiet: bool = True,
        keep_identical: bool = True,
        judged: Judged | None = None,
    ) -> Iterator[Run]:
        """`run`, of some of the queries at a time: what is found for all of them need not fit in memory.

        k: 1000 by default, or all where there are fewer. keep_identical: false leaves out the passage of a query's own id,
        unless it is `judged` relevant. Raises InputError for a k below 1 or beyond the passages.
        """
        k = min(1000, len(self.ids)) if k is None else k
        if k < 1:
            raise InputError("k", f"{k} results cannot be searched for", "use at least 1")
        check_k(k, len(self.ids))
        deep = k if keep_identical else with_spare(k, query_ids, self.ids, len(self.ids))
        found = self._found(query_ids, queries, deep, batch_size, quiet)
        return found if keep_identical else each_without_identical(found, k, judged)

    def _found(
        self, query_ids: Sequence[str], queries: Sequence[str], k: int, batch_size: int, quiet: bool
    ) -> Iterator[Run]:
        how = Encoding(batch_size, self.device)
        scores: Tensor | np.ndarray
        found: Tensor | np.ndarray
        with progress("searching", len(queries), "queries", shown=not quiet) as meter:
            for start in range(0, len(queries), AT_ONCE):
                some = queries[start : start + AT_ONCE]

                def texts(rows: Sequence[int], some: Sequence[str] = some) -> list[str]:
                    return [some[row] for row in rows]

                vectors_QD = encode_share(self.scorer.ranked, self.encoder, "queries", texts, range(len(some)), how)
                if isinstance(self.passages, Indexed):
                    asked = vectors_QD if isinstance(vectors_QD, SparseVectors) else vectors_QD.cpu().numpy()
                    scores, found = self.passages.search(asked, k)
                else:
                    with torch.no_grad():
                        scores, found = exact_search(vectors_QD, self.passages, k)
                yield make_run(query_ids[start : start + AT_ONCE], scores.tolist(), found.tolist(), self.ids)
                meter.advance(len(some))


def evaluate_index(
    model: ModelLike,
    index: str | Path,
    task: Task,
    *,
    batch_size: int = 64,
    out: str | Path | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Scores:
    """Metrics of an index, searched for a task's queries: with what it costs to be approximate.

    settings: `document_model` of `Searcher.open`, and of `Index.open`. out: a TREC run to write.
    Raises InputError as `Task.qrels`, `Searcher.open` and `Task.scores`.
    """
    qrels, dataset = task.qrels(out), task.dataset
    searcher = Searcher.open(model, dataset.folder, index=index, **settings)
    texts = dataset.queries.texts(dataset.queries.rows(list(qrels)))
    reading: dict[str, Any] = {"quiet": quiet, "keep_identical": task.keep_identical, "judged": qrels}
    reading["batch_size"] = batch_size
    runs = searcher.runs(list(qrels), texts, min(depth(task.measures), len(searcher.ids)), **reading)
    return score_each(runs, task, qrels, out)
