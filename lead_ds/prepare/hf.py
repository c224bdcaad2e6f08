"""Hugging Face datasets, of the hub or of local files: retrieval datasets in BeIR's and MTEB's configurations, or training
rows that carry their texts (Tevatron, FlagEmbedding, sentence-transformers columns). No code of a dataset is ever run.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lead_ds.data.groups.formats import IDS, LABELS, Lines, Listed, Unusable, key_of, reader_of
from lead_ds.errors import InputError, RunError
from lead_ds.io.mapped import signature
from lead_ds.prepare.irds import library
from lead_ds.prepare.plain_rows import SUFFIXES, plain_rows
from lead_ds.prepare.source import Judgement, Part, Source, Text, Tick

_FILES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_QUERY, _PASSAGE, _SCORE = (
    ("query-id", "query_id", "qid"),
    ("corpus-id", "corpus_id", "docid", "pid"),
    ("score", "label"),
)
_ID, _TEXT = ("_id", "id", "docid", "query_id", "pid"), ("text", "contents", "query", "body")
_SHAPES = "corpus, queries and qrels; Tevatron's; or columns such as query, positive, negative"


@dataclass(frozen=True)
class Table:
    """The rows of one split of one configuration, in a fixed order; `rows()` starts again."""

    where: str
    rows: Callable[[], Iterator[dict[str, Any]]]
    count: int
    identity: dict[str, Any]


def open_hf(name: str, corpus: str | None = None, subset: str | None = None) -> Source:
    """The dataset `name`: an id of the hub, or a local folder or file; `corpus`: the passages, where another has them.

    `subset` is one configuration of training rows. Raises InputError when it cannot be read or understood.
    """
    datasets = library("datasets", "prepare")
    if int(datasets.__version__.split(".")[0]) < 4:  # older ones would run a dataset's own script
        raise InputError("datasets", f"is of version {datasets.__version__}", "pip install 'lead-ds[prepare]'")
    versions = {"datasets": datasets.__version__, "pyarrow": importlib.metadata.version("pyarrow")}
    shown = f"{name} ({subset})" if subset else name
    path = Path(name).expanduser()
    kept = (
        f"{path.absolute()} ({subset})"
        if path.exists() and subset
        else str(path.absolute())
        if path.exists()
        else shown
    )
    configurations = _configurations(datasets, name)
    if subset is not None and subset not in configurations:
        raise InputError(name, f"has no configuration {subset!r}", f"it has {', '.join(configurations)}")
    if subset is None and {"corpus", "queries"} <= set(configurations):
        return _retrieval(datasets, name, configurations, kept, versions)
    if subset is None and len(configurations) > 1:
        raise InputError(name, f"has several configurations: {', '.join(configurations)}", "--subset NAME chooses one")
    tables = _tables(datasets, name, subset or next(iter(configurations), None))
    if "train" not in tables and len(tables) > 1:
        what = f"has no train among its splits: {', '.join(tables)}"
        raise InputError(name, what, "name the file of one of them, or rename it to train")
    table = tables.get("train") or next(iter(tables.values()))
    first = next(table.rows(), None)
    if first is None:
        raise InputError(table.where, "holds no rows", f"known are {_SHAPES}")
    passages = None if corpus is None else _texts([next(iter(_tables(datasets, corpus, None).values()))])
    return _training(table, first, kept, passages, versions)


def _configurations(datasets: Any, name: str) -> list[str]:
    path = Path(name).expanduser()
    if path.is_file() or _saved(path):
        return []
    if path.is_dir():
        inside = {p.name for p in path.iterdir() if p.is_dir() and (_saved(p) or _local_files(p))}
        inside |= {file.stem for file in _local_files(path) if file.stem in ("corpus", "queries", "qrels")}
        if {"corpus", "queries"} <= inside:
            return sorted(inside)
        if not (path / "README.md").is_file():
            return []
    return list(_call(name, datasets.get_dataset_config_names, name))


def _tables(datasets: Any, name: str, configuration: str | None) -> dict[str, Table]:
    """The splits of one configuration. Raises InputError."""
    path = Path(name).expanduser()
    folder = path / configuration if configuration and (path / configuration).is_dir() else path
    identity: dict[str, Any] = {"configuration": configuration}
    where = f"{name}/{configuration}" if configuration else name
    beside = [file for file in _local_files(path) if file.stem == configuration] if folder == path else []
    if _saved(folder):
        loaded = _call(where, datasets.load_from_disk, str(folder))
        identity |= _signatures([file for file in sorted(folder.rglob("*")) if file.is_file()])
    elif beside or (folder.exists() and (folder != path or not configuration)):
        files = beside or ([folder] if folder.is_file() else _local_files(folder))
        kinds = {_FILES.get(file.suffix) for file in files}
        if len(kinds) != 1 or None in kinds:
            raise InputError(where, "is not a dataset", f"a saved dataset, or files in {', '.join(_FILES)}")
        splits: dict[str, list[str]] = {}
        for file in files:
            splits.setdefault(_split_of(file), []).append(str(file))
        identity |= _signatures(files)
        if all(file.suffix in SUFFIXES for file in files):
            own = {split: [Path(file) for file in listed] for split, listed in splits.items()}
            return {split: _plain_table(f"{where}/{split}", listed, identity) for split, listed in own.items()}
        loaded = _call(where, datasets.load_dataset, kinds.pop(), data_files=splits, streaming=True)
    else:
        revision = None if path.exists() else _revision(name)
        loaded = _call(where, datasets.load_dataset, name, configuration, revision=revision)
        identity["revision"] = revision
        identity |= _signatures(sorted(path.rglob("*.*"))) if path.exists() else {}
    if not hasattr(loaded, "keys"):
        loaded = {str(loaded.split or "train"): loaded}
    return {split: _table(f"{where}/{split}", rows, identity) for split, rows in loaded.items()}


def _table(where: str, rows: Any, identity: dict[str, Any]) -> Table:
    def read() -> Iterator[dict[str, Any]]:
        found, end = _call(where, iter, rows), object()
        while (row := _call(where, next, found, end)) is not end:  # a file is looked at when its rows are wanted
            yield row

    return Table(where, read, getattr(rows, "num_rows", 0) or 0, {**identity, "split": where})


def _plain_table(where: str, files: list[Path], identity: dict[str, Any]) -> Table:
    return Table(where, lambda: plain_rows(files), 0, {**identity, "split": where})


def _saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _local_files(folder: Path) -> list[Path]:
    places = (folder, folder / "data")
    files = sorted(file for place in places if place.is_dir() for file in place.iterdir())
    for file in files:
        if file.suffix in _PACKED and Path(file.stem).suffix in _FILES:
            raise InputError(file, "is compressed, and tables are read as they are", "unpack it")
    return [file for file in files if file.suffix in _FILES]


def _split_of(file: Path) -> str:
    """`train` of train.parquet or train-00000-of-00004.parquet."""
    return file.stem.split("-")[0].replace(".", "_") or "train"


def _signatures(files: list[Path]) -> dict[str, Any]:
    return {str(file): signature(file) for file in files if file.is_file()}


def _revision(name: str) -> str | None:
    """The commit that the hub has now, so that all parts are of the same; None where the hub is away."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, timeout=10).sha
    except Exception:  # the cache may have it
        return None


def _call(where: str, function: Any, *arguments: Any, **options: Any) -> Any:
    try:
        return function(*arguments, **options)
    except ConnectionError as error:
        raise RunError(where, f"the hub cannot be reached: {error}", "see the network, or name a local copy") from None
    except Exception as error:  # datasets raises anything from FileNotFoundError to its own, for names it cannot load
        what = str(error).split("\n")[0][:300] or type(error).__name__
        raise InputError(where, f"cannot be loaded: {what}", "an id of the hub, or a local folder or file") from None


def _retrieval(datasets: Any, name: str, configurations: list[str], kept: str, versions: dict[str, str]) -> Source:
    """Configurations corpus, queries and qrels (BeIR, MTEB), or the judgements in a dataset NAME-qrels (BeIR on the hub)."""
    judged = next((c for c in ("qrels", "default") if c in configurations), None)
    if judged is not None:
        tables = _tables(datasets, name, judged)
    else:
        tables = _tables(datasets, f"{name}-qrels", None)
    qrels: dict[str, Part[Any]] = {
        "dev" if split == "validation" else split: Part(_judgements(table), table.count, "rows", table.identity)
        for split, table in tables.items()
    }
    return Source(
        "hf",
        kept,
        corpus=_texts(list(_tables(datasets, name, "corpus").values())),
        queries=_texts(list(_tables(datasets, name, "queries").values())),
        qrels=qrels,
        train="train" if "train" in qrels else None,
        versions=versions,
    )


def _texts(tables: list[Table]) -> Part[Text]:
    def read(tick: Tick) -> Iterator[Text]:
        for table in tables:
            for number, row in enumerate(table.rows(), 1):
                name, text = _field(row, _ID, table.where), _field(row, _TEXT, table.where)
                if not isinstance(text, str):
                    raise InputError(f"{table.where}:{number}", "the text is not a string", f"row {name!r}")
                if not isinstance(title := row.get("title") or "", str):
                    raise InputError(f"{table.where}:{number}", "the title is not a string", f"row {name!r}")
                tick(1)
                yield Text(str(name), title, text, f"{table.where}:{number}")

    identity = {table.where: table.identity for table in tables}
    return Part(read, sum(table.count for table in tables), "rows", identity)


def _judgements(table: Table) -> Callable[[Tick], Iterator[Judgement]]:
    def read(tick: Tick) -> Iterator[Judgement]:
        for number, row in enumerate(table.rows(), 1):
            where = f"{table.where}:{number}"
            score = _field(row, _SCORE, where)
            if not isinstance(score, int | float) or score % 1 != 0:
                raise InputError(where, f"the judgement {score!r} is not an integer", "see the dataset's qrels")
            tick(1)
            yield Judgement(where, str(_field(row, _QUERY, where)), str(_field(row, _PASSAGE, where)), int(score))

    return read


def _field(row: dict[str, Any], names: tuple[str, ...], where: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise InputError(where, f"no column {' or '.join(map(repr, names))}", f"its columns are {', '.join(row)}")


def _training(
    table: Table, first: dict[str, Any], kept: str, corpus: Part[Text] | None, versions: dict[str, str]
) -> Source:
    """Rows that carry their texts: passages become the corpus (unless there is one), each once."""
    form = _form(first, table.where)
    try:
        reader = reader_of(form, first)
    except Unusable as error:
        raise InputError(table.where, error.what, error.remedy) from None

    def groups(tick: Tick) -> Iterator[tuple[int, Lines]]:
        held: list[dict[str, Any]] = []
        for number, row in enumerate(table.rows(), 1):
            tick(1)
            if held and not (reader.grouped and _query(row) == _query(held[0])):
                yield number - len(held), _join(reader, held, f"{table.where}:{number - len(held)}")
                held = []
            held.append(row)
        if held:
            yield number + 1 - len(held), _join(reader, held, f"{table.where}:{number + 1 - len(held)}")

    def passages(tick: Tick) -> Iterator[Text]:
        known: set[int] = set()
        for number, lines in groups(tick):
            for passage in (*lines.positives, *lines.negatives):
                if passage.key not in known:
                    known.add(passage.key)
                    yield Text(_passage_id(passage), "", passage.text, f"{table.where}:{number}")

    def queries(tick: Tick) -> Iterator[Text]:
        for number, lines in groups(tick):
            yield Text(_query_id(lines), "", lines.query, f"{table.where}:{number}")

    def judged(tick: Tick) -> Iterator[Judgement]:
        known: set[int] = set()
        for number, lines in groups(tick):
            for passage in lines.positives:
                name, query = _passage_id(passage), _query_id(lines)
                key = key_of(f"{query}\t{name}")
                if key not in known:
                    known.add(key)
                    yield Judgement(f"{table.where}:{number}", query, name, 1)

    def training(tick: Tick) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, lines in groups(tick):
            if not lines.positives:
                raise InputError(f"{table.where}:{number}", "has no positive", "give it one, or take it out")
            group: dict[str, Any] = {
                "query_id": _query_id(lines),
                "positives": [_passage_id(passage) for passage in lines.positives],
                "negatives": [_passage_id(passage) for passage in lines.negatives],
            }
            listed = (*lines.positives, *lines.negatives)
            if scores := {_passage_id(passage): passage.score for passage in listed if not math.isnan(passage.score)}:
                group["scores"] = scores
            yield f"{table.where}:{number}", group

    def rows(read: Callable[[Tick], Iterator[Any]]) -> Part[Any]:
        return Part(read, table.count, "rows", table.identity)

    return Source(
        "hf",
        kept,
        corpus=corpus or rows(passages),
        queries=rows(queries),
        qrels={"train": rows(judged)},
        groups=rows(training),
        versions=versions,
    )


def _form(row: dict[str, Any], where: str) -> str:
    if "positive_passages" in row:
        return "tevatron"
    if "query" in row and "pos" in row:
        return "flagembedding"
    if by_id := [name for name in row if name in IDS]:
        what = f"the column {by_id[0]!r} holds ids, and training rows hold texts"
        raise InputError(where, what, f"name the folder that has corpus, queries and qrels; known are {_SHAPES}")
    if sum(isinstance(value, str | list) for name, value in row.items() if name not in LABELS) >= 2:
        return "sentence-transformers"
    raise InputError(where, f"no known format has the columns {', '.join(row)}", f"known are {_SHAPES}")


def _join(reader: Any, rows: list[dict[str, Any]], where: str) -> Lines:
    try:
        return reader.join(rows)
    except Unusable as error:
        raise InputError(where, error.what, error.remedy) from None


def _query(row: dict[str, Any]) -> Any:
    return next(value for name, value in row.items() if name not in LABELS)


def _query_id(lines: Lines) -> str:
    return lines.name if lines.name is not None else f"{key_of(lines.query):016x}"


def _passage_id(passage: Listed) -> str:
    return passage.name if passage.name is not None else f"{passage.key:016x}"
