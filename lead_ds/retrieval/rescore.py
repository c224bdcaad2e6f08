"""Candidates scored anew by a teacher, part by part: what was scored is kept beside the output, and not scored again."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from lead_ds.data.collections.dataset import Dataset
from lead_ds.data.collections.qrels import Run
from lead_ds.errors import InputError
from lead_ds.io.files import atomic, checksum, model_checksum
from lead_ds.io.json_text import parse_json
from lead_ds.retrieval.rerank import Reranker, rerank

PART = 256  # queries whose scores are kept together


def open_teacher(model: str, settings: Sequence[str] = ()) -> tuple[Reranker, str]:
    """The model that scores, and what its scores depend on.

    model: a directory or hub name; settings: `key=value` of a teacher's section. Raises InputError as `Reranker.open`.
    """
    return Reranker.open(model, settings=settings), json.dumps([model_checksum(model), sorted(settings)])


def rescore(
    teacher: tuple[Reranker, str],
    dataset: Dataset,
    run: Run,
    folder: Path,
    *,
    batch_size: int = 64,
    quiet: bool = False,
) -> Run:
    """The run's passages with the teacher's scores. Continued where an earlier call with the same input was ended.

    folder: of the parts, each named by what it was made of. Raises InputError for a part that cannot be read, RunError for
    scores that are not finite.
    """
    reranker, of = teacher
    facts = [of, checksum([dataset.corpus.path, dataset.queries.path])]
    queries, found = list(run), {}
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(queries), PART):
        part = {query: run[query] for query in queries[start : start + PART]}
        asked = json.dumps([facts, {query: sorted(names) for query, names in part.items()}])
        path = folder / f"scores-{hashlib.blake2b(asked.encode(), digest_size=8).hexdigest()}.json.gz"
        if path.exists():
            try:
                found.update(parse_json(gzip.decompress(path.read_bytes())))
            except (OSError, EOFError, ValueError) as error:
                raise InputError(path, f"cannot be read: {error}", "remove it: its queries are scored again") from None
            continue
        scored = rerank(reranker.scorer, reranker.encoder, dataset, part, batch_size=batch_size, quiet=quiet)
        with atomic(path) as temporary:
            temporary.write_bytes(gzip.compress(json.dumps(scored, allow_nan=False).encode()))
        found.update(scored)
    return found
