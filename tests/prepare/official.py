"""Small collections in exactly the formats in which they are published, and the command on them."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from tests.helpers import forked

# Ids as published, rows as published: ids do not follow the lines' order, one id is another's beginning, a text has
# blanks at its ends, line breaks that are not newlines, a quote, a tab's escape and letters beyond ASCII.
PASSAGES = {
    "0": "The presence of communication amid scientific minds was equally important.",
    "1": 'The "Manhattan Project" and its atomic bomb \\t helped bring an end to World War II.',
    "10": " Essay on The Manhattan Project — Déjà vu. ",
    "2": "A line\u2028separator, a \x0b tab, a \r return and a \x85 next line stay inside.",
    "7067032": "Paula Deen and her brother Earl W. Bubba Hiers are being sued.",
    "8841822": "日本語のテキスト",
}
QUERIES = {
    "train": {"1185869": ")what was the immediate impact of the manhattan project?", "15": " leading blank"},
    "dev": {"1048585": "what is paula deen's brother", "2": " Androgen receptor define", "99": "not in the small set"},
    "dev.small": {"1048585": "what is paula deen's brother", "2": " Androgen receptor define"},
    "eval": {"786786": "what is prior authorization"},
}
QRELS = {
    "train": [("1185869", "0", 1), ("15", "10", 1), ("1185869", "1", 1)],
    "dev": [("1048585", "7067032", 1), ("2", "2", 1), ("99", "1", 1)],
    "dev.small": [("1048585", "7067032", 1), ("2", "2", 1)],
}
TRIPLES = [
    ("1185869", "0", "2"),
    ("15", "10", "0"),
    ("1185869", "1", "8841822"),
    ("1185869", "0", "1"),  # a positive of the query is no negative of it
    ("1185869", "0", "2"),
    ("15", "10", "7067032"),
]
DOCUMENTS = {
    "D1555982": ("https://answers.yahoo.com/question/1", "The hot glowing surfaces of stars", "Body one. With words."),
    "D301595": ("http://childparenting.about.com/a.htm", "", "A body without a title"),
    "D1359209": ("http://visihow.com/b", "Title\\only", ""),
}


def tsv(rows: Any, separator: str = "\t") -> bytes:
    return "".join(separator.join(map(str, row)) + "\n" for row in rows).encode()


def passage_files() -> dict[str, bytes]:
    """MS MARCO passage ranking: every table with tabs, judgements in TREC's four columns."""
    files = {"collection.tsv": tsv(PASSAGES.items())}
    files |= {f"queries.{split}.tsv": tsv(queries.items()) for split, queries in QUERIES.items()}
    files |= {f"qrels.{split}.tsv": tsv((q, 0, p, score) for q, p, score in rows) for split, rows in QRELS.items()}
    return files


def document_files() -> dict[str, bytes]:
    """MS MARCO document ranking: docid, url, title, body with tabs; judgements and runs with blanks."""
    return {
        "msmarco-docs.tsv.gz": tsv((name, *fields) for name, fields in DOCUMENTS.items()),
        "msmarco-doctrain-queries.tsv.gz": tsv([("3", "another name for the primary visual cortex"), ("5", "axilla")]),
        "msmarco-doctrain-qrels.tsv.gz": tsv([("3", 0, "D301595", 1), ("5", 0, "D1359209", 1)], " "),
        "msmarco-docdev-queries.tsv.gz": tsv([("2", "androgen receptor define")]),
        "msmarco-docdev-qrels.tsv.gz": tsv([("2", 0, "D1555982", 1)], " "),
        "msmarco-doctrain-top100.gz": tsv(
            [
                ("3", "Q0", "D1555982", 1, -5.11498, "IndriQueryLikelihood"),
                ("3", "Q0", "D301595", 2, -5.57703, "IndriQueryLikelihood"),
                ("5", "Q0", "D301595", 1, -5.9, "IndriQueryLikelihood"),
            ],
            " ",
        ),
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """Files into a folder, those that end in `.gz` gzipped."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            data = gzip.compress(content) if name.endswith(".gz") else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def rows(path: Path) -> list[tuple[str, ...]]:
    """A qrels file's rows after its header."""
    lines = path.read_text().split("\n")
    assert lines[0] == "query-id\tcorpus-id\tscore"
    assert lines[-1] == ""
    return [tuple(line.split("\t")) for line in lines[1:-1]]


def tree(folder: Path) -> dict[str, bytes]:
    """Every prepared file's bytes, without the manifest and indexes."""
    paths = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".") and p.name != "prepare.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "lead_ds", "prepare", *map(str, arguments)]


def lead_ds(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`lead-ds prepare ...` as a user runs it."""
    return forked.lead_ds("prepare", *arguments)
