"""Search and rerank from Python: over a folder, an index, or texts in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lead_ds.data.collections.dataset import Dataset
from lead_ds.data.collections.qrels import Run
from lead_ds.errors import InputError
from lead_ds.face.model import Model, as_model
from lead_ds.retrieval.evaluate import dual_encoder
from lead_ds.retrieval.index import Index
from lead_ds.retrieval.rerank import Reranker as _Reranker
from lead_ds.retrieval.search import Hit
from lead_ds.retrieval.search import Searcher as _Searcher

Corpus = str | Path | Sequence[str] | Mapping[str, str]


class Searcher:
    """A dual encoder over passages, searched exactly, or over an index that `lead-ds index` wrote.

    corpus: a folder with corpus.jsonl; or texts, by id or in a list (their ids are then "0", "1", ...). With an index, a folder
    gives the hits their texts. document_model: what encodes, or encoded, the passages, where that is another model.
    index_settings: nprobe, ef_search, gpus, layout. Raises InputError for a model of another kind,
    and for an index that another model made.

    >>> searcher = Searcher(dual_encoder, {"o": "owls fly silently", "g": "glaciers grind rock"})
    >>> [hit.id for hit in searcher.search("what grinds rock", k=2)]  # doctest: +ELLIPSIS
    ['...', '...']
    """

    def __init__(
        self,
        model: Model | str | Path,
        corpus: Corpus | None = None,
        *,
        index: str | Path | None = None,
        batch_size: int = 64,
        document_model: Model | str | Path | None = None,
        **index_settings: Any,
    ) -> None:
        self.model = as_model(model)
        scorer, encoder = dual_encoder(self.model.scorer), self.model.encoder
        if index is None and index_settings:
            raise InputError(next(iter(index_settings)), "is a setting of an index", "give index=, or take it out")
        texts = Dataset.open(corpus).corpus if isinstance(corpus, str | Path) else None
        if index is not None:
            if corpus is not None and texts is None:
                raise InputError("corpus", "texts in memory do not go with an index", "give the index's own folder")
            opened = Index.open(index, **index_settings)
            made_by = document_model.path if isinstance(document_model, Model) else document_model
            self._searcher = _Searcher.over_index(scorer, encoder, self.model.path, opened, texts, made_by)
            return
        if corpus is None:
            raise InputError("Searcher", "needs a corpus or an index", "give one of them")
        passages = _Memory(corpus) if texts is None else texts  # type: ignore[arg-type]
        other = None if document_model is None else as_model(document_model)
        documents = None if other is None else (dual_encoder(other.scorer), other.encoder)
        reading: dict[str, Any] = {"batch_size": batch_size, "quiet": True, "documents": documents}
        self._searcher = _Searcher.over_corpus(scorer, encoder, passages, **reading)

    def search(self, query: str, k: int = 10) -> list[Hit]:
        """The k best passages of a query, best first, or all where there are fewer: each with id, score and text."""
        return self._searcher.search(query, min(k, len(self._searcher.ids)))

    def run(self, queries: Sequence[str] | Mapping[str, str], k: int = 1000) -> Run:
        """The k best passages of many queries: query id -> passage id -> score. Ids of a list: "0", "1", ..."""
        ids, texts = _named(queries)
        return self._searcher.run(ids, texts, min(k, len(self._searcher.ids)))


class Reranker:
    """A model of any kind over candidates.

    >>> from lead_ds import load
    >>> reranker = Reranker(load(cross_encoder, max_length=64))
    >>> [hit.text for hit in reranker.rank("who flies silently", ["an owl", "a glacier"], k=1)]  # doctest: +ELLIPSIS
    ['...']
    """

    def __init__(self, model: Model | str | Path, *, batch_size: int = 64) -> None:
        self.model, self.batch_size = as_model(model), batch_size

    def scores(self, query: str, passages: Sequence[str]) -> list[float]:
        """The relevance of each passage to the query."""
        return _Reranker(self.model.scorer, self.model.encoder).scores(query, passages, self.batch_size)

    def rank(
        self, query: str, candidates: Sequence[Hit] | Sequence[str] | Mapping[str, str], k: int | None = None
    ) -> list[Hit]:
        """Candidates in the model's order, best first, the k best of them: what a searcher found, or texts."""
        hits = [candidate for candidate in candidates if isinstance(candidate, Hit)]
        if len(hits) == len(candidates):
            ids, texts = [hit.id for hit in hits], [hit.text for hit in hits]
        else:
            ids, texts = _named(candidates)  # type: ignore[arg-type]
        if any(not text for text in texts):
            remedy = "give the searcher the corpus' folder as well as its index"
            raise InputError("candidates", "a passage has no text", remedy)
        found = zip(ids, self.scores(query, texts), texts, strict=True)
        return sorted((Hit(*each) for each in found), key=lambda hit: -hit.score)[:k]


class _Memory:
    """Passages in memory, as a searcher reads them."""

    def __init__(self, corpus: Sequence[str] | Mapping[str, str]) -> None:
        self.ids, self.passages = _named(corpus)
        if not self.ids:
            raise InputError("corpus", "holds no passages", "give at least one")
        self._rows = {name: row for row, name in enumerate(self.ids)}

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, names: Sequence[str]) -> np.ndarray:
        """The row of each id, -1 for none."""
        return np.array([self._rows.get(name, -1) for name in names], np.int64)

    def text(self, row: int) -> str:
        """The text of a row."""
        return self.passages[row]

    def texts(self, rows: Sequence[int]) -> list[str]:
        """The texts of rows."""
        return [self.passages[row] for row in rows]


def _named(texts: Sequence[str] | Mapping[str, str]) -> tuple[list[str], list[str]]:
    if isinstance(texts, Mapping):
        return [str(name) for name in texts], list(texts.values())
    return [str(row) for row in range(len(texts))], list(texts)
