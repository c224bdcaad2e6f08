"""Groups whose passages are ids of the corpus: the canonical train.jsonl, or a qrels file.

Opening resolves every id to its row once, by blocks and vectorised, into arrays that are mapped from disk; a draw then
reads nothing but the texts it chose.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lead_ds.data.collections.dataset import Dataset
from lead_ds.data.collections.qrels import read_judgements, refuse_conflict
from lead_ds.data.collections.texts import Texts
from lead_ds.data.groups.drawing import Draw
from lead_ds.data.groups.group import Group, KnownPositives, Pool, no_scores, refuse_unscored, short_of, twin_of
from lead_ds.data.groups.schedule import easy_to_hard
from lead_ds.errors import InputError
from lead_ds.io.jsonl import Block, read_blocks
from lead_ds.io.mapped import Arrays, cached_arrays, open_buffer, signature

if TYPE_CHECKING:
    from lead_ds.settings.data import DataConfig

_SHAPE = (
    'each line is {"query_id", "positives": [id], "negatives": [id], "scores": {id: number}}, scores if there are any'
)


class IdGroups:
    """Groups of ids over a corpus and queries."""

    alone = False

    def __init__(self, config: DataConfig, path: Path, form: str, dataset: Dataset, arrays: Arrays) -> None:
        self.path, self._form, self._config = path, form, config
        self.corpus, self.queries = dataset.corpus, dataset.queries
        self.sources = {"train": path, "corpus": self.corpus.path, "queries": self.queries.path}
        self.checksums: dict[str, str] = {}
        self._query, self._scores = arrays["query"], arrays["scores"]
        self._positives, self._positive_starts = arrays["positives"], arrays["positive_starts"]
        self._negatives, self._negative_starts = arrays["negatives"], arrays["negative_starts"]
        self.has_scores, self._scored = len(self._scores) > 0, False
        groups, passages = arrays["same_groups"], arrays["same_passages"]
        same = {} if config.keep_identical else _by_group(groups, passages)
        self.identical = len(same)
        self.short = short_of(arrays["own"], config.negatives)
        self._known = KnownPositives(self._query, self._positive_starts, self._positives, same)
        if not self._known.leave(len(self.corpus), config.negatives):
            what = f"{len(self.corpus)} passages are too few for {config.negatives} negatives of every query"
            raise InputError("data.negatives", f"{what}, beside its positives, in {self.corpus.path}", "lower it")

    @classmethod
    def open(cls, config: DataConfig, path: Path, form: str) -> IdGroups:
        """Open groups in format `form` (canonical or qrels). Raises InputError naming file and line."""
        dataset = Dataset.open(config.path)
        corpus, queries = dataset.corpus, dataset.queries
        key = {"version": 4, "form": form, "train": signature(path)}
        key |= {"corpus": signature(corpus.path), "queries": signature(queries.path)}
        build = _build_qrels if form == "qrels" else _build_canonical

        def built() -> Arrays:
            arrays = build(path, corpus, queries)
            arrays["own"] = _own(arrays)
            arrays["same_groups"], arrays["same_passages"] = corpus.asking(queries, arrays["query"])
            return arrays

        return cls(config, path, form, dataset, cached_arrays(path, form, key, built))

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self._config, self.path, self._form, self._scored)

    def __len__(self) -> int:
        return len(self._query)

    def draw(self, row: int, seed: int, epoch: int, progress: float | None = None, *, texts: bool = True) -> Group:
        """See `Groups.draw`. Negatives come from the line's list, then from the corpus at random; none is a positive.

        texts: false leaves the texts themselves unread and empty.
        """
        draw, wanted = Draw(seed, epoch, row), self._config.negatives
        first, last = int(self._positive_starts[row]), int(self._positive_starts[row + 1])
        chosen = [first + draw.below(last - first)]
        rows = [int(self._positives[chosen[0]])]
        known = self._known.of(row)
        taken = set(known.tolist())
        start, stop = int(self._negative_starts[row]), int(self._negative_starts[row + 1])
        order = draw.shuffled(stop - start)
        if progress is not None:
            before = len(self._positives)
            order = easy_to_hard(draw, self._scores[before + start : before + stop], wanted, progress)
        while len(rows) <= wanted and (i := next(order, None)) is not None:
            candidate = int(self._negatives[start + i])
            if candidate not in taken:
                taken.add(candidate)
                rows.append(candidate)
                chosen.append(start + i)
        while len(rows) <= wanted:
            candidate = draw.below(len(self.corpus))
            if candidate not in taken:
                taken.add(candidate)
                rows.append(candidate)
        query = int(self._query[row])
        return Group(
            query_id=self.queries.ids[query],
            query=self.queries.text(query) if texts else "",
            passage_ids=[self.corpus.ids[i] for i in rows],
            passages=self.corpus.texts(rows) if texts else [""] * len(rows),
            keys=np.array(rows, np.int64),
            positive_keys=known,
            query_key=query,
            scores=self._scores_of(chosen, len(rows)) if self.has_scores else None,
        )

    def pool(self, row: int) -> Pool:
        query, keys = self.listed(row)
        return Pool(self.queries.text(query), keys, self.corpus.texts(keys))

    def listed(self, row: int) -> tuple[int, np.ndarray]:
        first, last = int(self._positive_starts[row]), int(self._positive_starts[row + 1])
        keys = np.concatenate([np.unique(self._positives[first:last]), self._offered(row)]).astype(np.int64)
        return int(self._query[row]), keys

    def offered(self, row: int) -> int:
        return len(self._offered(row))

    def where(self, row: int) -> str:
        """See `Groups.where`. Reads the file, up to the row's record."""
        first = 0
        for block in read_blocks(self.path, open_buffer(self.path)) if self._form == "canonical" else ():
            if row < first + len(block.records):
                return f"{self.path}:{block.numbers[row - first]}"
            first += len(block.records)
        return str(self.path)

    def scored(self) -> IdGroups:
        if not self.has_scores:
            raise no_scores(self)
        groups = self._only_scored()
        positives = np.diff(groups._positive_starts)
        for row in range(len(groups)):
            refuse_unscored(groups, row, int(positives[row]), groups.offered(row), self._config.negatives)
        return groups

    def _only_scored(self) -> IdGroups:
        """A copy without the passages that have no score, but with all known positives."""
        groups, has = twin_of(self), np.isfinite(self._scores)
        groups._scored = True
        if has.all():
            return groups
        first, kept = 0, []
        for name, starts in (("_positives", "_positive_starts"), ("_negatives", "_negative_starts")):
            rows, bounds = getattr(self, name), getattr(self, starts)
            some = has[first : first + len(rows)]
            kept.append(self._scores[first : first + len(rows)][some])
            setattr(groups, name, rows[some])
            setattr(groups, starts, np.concatenate([[0], np.cumsum(some)])[bounds])
            first += len(rows)
        groups._scores = np.concatenate(kept)
        return groups

    def _offered(self, row: int) -> np.ndarray:
        listed = self._negatives[int(self._negative_starts[row]) : int(self._negative_starts[row + 1])]
        return np.setdiff1d(listed, self._known.of(row))

    def _scores_of(self, chosen: list[int], size: int) -> np.ndarray:
        scores = np.full(size, np.nan, np.float32)
        scores[0] = self._scores[chosen[0]]
        scores[1 : len(chosen)] = self._scores[len(self._positives) + np.array(chosen[1:], np.int64)]
        return scores


def _reopened(config: DataConfig, path: Path, form: str, scored: bool) -> IdGroups:
    groups = IdGroups.open(config, path, form)
    return groups._only_scored() if scored else groups


def _build_canonical(path: Path, corpus: Texts, queries: Texts) -> Arrays:
    query: list[np.ndarray] = []
    positives: list[np.ndarray] = []
    positive_counts: list[np.ndarray] = []
    positive_scores: list[np.ndarray] = []
    negatives: list[np.ndarray] = []
    negative_counts: list[np.ndarray] = []
    negative_scores: list[np.ndarray] = []
    for block in read_blocks(path, open_buffer(path)):
        groups = list(_canonical(block))
        names = [name for name, _, _, _ in groups]
        positive_lists, negative_lists = [p for _, p, _, _ in groups], [n for _, _, n, _ in groups]
        query.append(_resolve(block, queries, [[name] for name in names], "query"))
        for lists, rows, counts, scores in (
            (positive_lists, positives, positive_counts, positive_scores),
            (negative_lists, negatives, negative_counts, negative_scores),
        ):
            rows.append(_resolve(block, corpus, lists, "passage").astype(_row_type(corpus)))
            counts.append(np.fromiter(map(len, lists), np.int64, len(lists)))
            scores.append(_listed_scores(block, lists, [found for _, _, _, found in groups]))
    if not query:
        raise InputError(path, "holds no groups", _SHAPE)
    joined = np.concatenate([*positive_scores, *negative_scores])
    return {
        "query": np.concatenate(query),
        "positives": np.concatenate(positives),
        "positive_starts": _starts(positive_counts),
        "negatives": np.concatenate(negatives),
        "negative_starts": _starts(negative_counts),
        "scores": joined[:0] if np.isnan(joined).all() else joined,
    }


def _listed_scores(block: Block, lists: list[list[str]], found: list[dict[str, float]]) -> np.ndarray:
    """The score of each id of `lists`, joined, NaN where absent. float32."""
    if not any(found):
        return np.full(sum(map(len, lists)), np.nan, np.float32)
    with np.errstate(over="ignore"):
        listed = [table.get(name, np.nan) for ids, table in zip(lists, found, strict=True) for name in ids]
        scores = np.array(listed, np.float64).astype(np.float32)
    if np.isinf(scores).any():
        place = int(np.flatnonzero(np.isinf(scores))[0])
        record = int(np.searchsorted(np.cumsum([len(ids) for ids in lists]), place, "right"))
        block.fail(record, f"the score {listed[place]} is beyond 32-bit floats", "give finite scores below 3e38")
    return scores


def _canonical(block: Block) -> Iterator[tuple[str, list[str], list[str], dict[str, float]]]:
    """Query id, positive ids, negative ids and scores of each record."""
    block.refuse_misspelt(("query_id", "positives", "negatives", "scores"))
    for row, record in enumerate(block.records):
        for field in ("query_id", "positives"):
            if field not in record:
                block.fail(row, f"no field {field!r}", _SHAPE)
        ids = {"positives": record["positives"], "negatives": record.get("negatives") or []}
        for field, names in ids.items():
            if not isinstance(names, list):
                block.fail(row, f"the field {field!r} is not a list of ids", _SHAPE)
            if not set(map(type, names)) <= {str}:
                if not set(map(type, names)) <= {str, int}:
                    block.fail(row, f"the field {field!r} is not a list of ids", _SHAPE)
                ids[field] = [str(name) for name in names]
        if not ids["positives"]:
            block.fail(row, f"query {record['query_id']!r} has no positive", "give it one, or take the line out")
        scores = record.get("scores") or {}
        if not isinstance(scores, dict) or not set(map(type, scores.values())) <= {int, float}:
            block.fail(row, "the field 'scores' does not map ids to numbers", _SHAPE)
        yield str(record["query_id"]), ids["positives"], ids["negatives"], scores


def _resolve(block: Block, texts: Texts, lists: list[list[str]], kind: str) -> np.ndarray:
    """The row of each id of `lists`, joined. int64."""
    names = list(chain.from_iterable(lists))
    rows = texts.rows(names)
    missing = np.flatnonzero(rows < 0)
    if len(missing):
        record = int(np.searchsorted(np.cumsum([len(ids) for ids in lists]), missing[0], "right"))
        remedy = "add its text there, or take it out of the group"
        block.fail(record, f"{kind} {names[int(missing[0])]!r} is not in {texts.path.name}", remedy)
    return rows


def _build_qrels(path: Path, corpus: Texts, queries: Texts) -> Arrays:
    numbers: list[int] = []
    names: list[tuple[str, str]] = []
    judged: dict[tuple[str, str], int] = {}
    for number, query, passage, judgement in read_judgements(path):
        if judged.setdefault((query, passage), judgement) != judgement:
            refuse_conflict(path, query, passage)
        if judgement > 0:
            numbers.append(number)
            names.append((query, passage))
    del judged
    if not names:
        raise InputError(path, "holds no groups", "no judgement in it is above 0")
    columns = []
    for texts, column, kind in ((queries, 0, "query"), (corpus, 1, "passage")):
        rows = texts.rows([pair[column] for pair in names])
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            first = int(missing[0])
            what = f"{kind} {names[first][column]!r} is not in {texts.path.name}"
            raise InputError(f"{path}:{numbers[first]}", what, "add its text there, or take its judgements out")
        columns.append(rows)
    query_rows, passage_rows = columns
    _, firsts, groups, counts = np.unique(query_rows, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(firsts[groups], kind="stable")  # groups in the order of the file
    by_file = np.argsort(firsts)
    return {
        "query": query_rows[firsts[by_file]],
        "positives": passage_rows[order].astype(_row_type(corpus)),
        "positive_starts": _starts([counts[by_file]]),
        "negatives": np.zeros(0, _row_type(corpus)),
        "negative_starts": np.zeros(len(counts) + 1, np.int64),
        "scores": np.zeros(0, np.float32),
    }


def _own(arrays: Arrays) -> np.ndarray:
    """Of each group, its different negatives that are no positives of it; -1 where no group lists any. int32."""
    groups = len(arrays["query"])
    if len(arrays["negatives"]) == 0:
        return np.full(groups, -1, np.int32)
    passages = 1 + max(int(arrays[name].max()) for name in ("negatives", "positives"))
    # One number for a group and a passage, sorted: over millions np.unique, which hashes, takes fifty times as long.
    negatives, positives = (
        np.sort(np.repeat(np.arange(groups), np.diff(arrays[f"{name[:-1]}_starts"])) * passages + arrays[name])
        for name in ("negatives", "positives")
    )
    negatives = negatives[np.diff(negatives, prepend=-1) > 0]
    place = np.minimum(np.searchsorted(positives, negatives), len(positives) - 1)
    own = negatives[positives[place] != negatives]
    return np.bincount(own // passages, minlength=groups).astype(np.int32)


def _by_group(groups: np.ndarray, passages: np.ndarray) -> dict[int, np.ndarray]:
    order = np.argsort(groups, kind="stable")
    rows, firsts = np.unique(groups[order], return_index=True)
    return dict(zip(rows.tolist(), np.split(passages[order], firsts[1:]), strict=True)) if len(rows) else {}


def _row_type(texts: Texts) -> type[np.signedinteger[Any]]:
    return np.int32 if len(texts) < 1 << 31 else np.int64


def _starts(counts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
