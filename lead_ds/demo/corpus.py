"""A retrieval collection out of the Python packages on this machine: what a function does -> its code.

Query: the first sentence of a function's docstring. Passage: its source without the docstring. Split by module, so that
no training query's module is tested on. Few training queries are judged, as in most collections that people have; the
others, and their passages, are texts alone. Deterministic for the same installed packages.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import random
import re
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lead_ds.errors import RunError

PACKAGES = ("stdlib", "torch", "numpy", "transformers", "deepspeed", "pydantic", "matplotlib", "rich", "accelerate")
PER_PACKAGE = 300  # so that torch alone does not make the collection
SHORTEST, LONGEST = 3, 60  # lines of code: shorter means nothing, longer is cut by the model anyway
NEGATIVES = 4
JUDGED = 256  # training queries whose passages are known


@dataclass(frozen=True)
class Function:
    """One documented function."""

    module: str
    name: str
    query: str
    code: str


def build_corpus(folder: Path) -> Path:
    """Write the collection in the canonical layout under `folder`, once for each set of package versions."""
    functions = list(collect())
    if len(functions) < 500:
        raise RunError(
            "demo",
            f"found {len(functions)} documented functions on this machine",
            "install torch and numpy with their sources",
        )
    digest = hashlib.blake2b(repr((JUDGED, functions)).encode(), digest_size=8).hexdigest()
    target = folder / f"python-functions-{digest}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            write(functions, Path(scratch) / "data")
            (Path(scratch) / "data").replace(target)
    return target


def collect() -> Iterator[Function]:
    """Documented functions of the packages, without repetitions."""
    queries, codes = set(), set()
    for package in PACKAGES:
        taken = 0
        for module, path in modules(package):
            for function in functions_of(module, path):
                code_key = re.sub(r"\s+", " ", function.code)
                if function.query.lower() in queries or code_key in codes:
                    continue
                queries.add(function.query.lower())
                codes.add(code_key)
                yield function
                taken += 1
                if taken == PER_PACKAGE:
                    break
            if taken == PER_PACKAGE:
                break


def modules(package: str) -> list[tuple[str, Path]]:
    """Module names and files of a package, in an order that mixes its parts but is always the same."""
    if package == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = [
            *root.glob("*.py"),
            *(
                f
                for sub in ("json", "email", "http", "logging", "concurrent", "unittest")
                for f in root.glob(f"{sub}/*.py")
            ),
        ]
    else:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            return []
        root = Path(next(iter(spec.submodule_search_locations))).parent
        files = list((root / package).rglob("*.py"))
    named = [(".".join(f.relative_to(root).with_suffix("").parts), f) for f in files]
    kept = [
        (name, f) for name, f in named if not re.search(r"(^|[._])(test|tests|testing|conftest|_vendor)([._]|$)", name)
    ]
    return sorted(kept, key=lambda item: hashlib.blake2b(item[0].encode()).digest())


def functions_of(module: str, path: Path) -> Iterator[Function]:
    """The documented functions of a file."""
    try:
        source = path.read_text("utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escape sequences in others' code
            tree = ast.parse(source)
    except (OSError, SyntaxError, UnicodeDecodeError, ValueError):
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or len(node.body) < 2:
            continue
        if node.name.startswith("__"):  # "Initialize self" could be anything's
            continue
        query = first_sentence(ast.get_docstring(node) or "")
        docstring = node.body[0]
        if not query or docstring.end_lineno is None or node.end_lineno is None:
            continue
        code = lines[node.lineno - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
        code = [line for line in code if line.strip()]
        if SHORTEST <= len(code) <= LONGEST:
            indent = len(code[0]) - len(code[0].lstrip())
            yield Function(module, node.name, query, "\n".join(line[indent:] for line in code))


def first_sentence(docstring: str) -> str:
    """The first sentence, in one line; empty where it is not a description in words."""
    paragraph = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    sentence = re.split(r"(?<=[.!?])\s", re.sub(r"\s+", " ", paragraph), maxsplit=1)[0].strip()
    words = re.findall(r"[A-Za-z]{2,}", sentence)
    if not 4 <= len(words) <= 40 or "->" in sentence or sentence.startswith((":", "@", ">>>", "r'")):
        return ""
    return sentence


def split_of(module: str) -> str:
    """train, dev or test: by module, one in ten for each of the latter."""
    bucket = hashlib.blake2b(module.encode(), digest_size=4).digest()[0] % 10
    return {0: "dev", 1: "test"}.get(bucket, "train")


def write(functions: list[Function], folder: Path) -> None:
    """The canonical layout: corpus, queries, judgements, training groups with neighbours as hard negatives, texts alone."""
    (folder / "qrels").mkdir(parents=True)
    neighbours: dict[str, list[int]] = {}
    for row, function in enumerate(functions):
        neighbours.setdefault(function.module.rpartition(".")[0] or function.module, []).append(row)
    with (
        (folder / "corpus.jsonl").open("w", encoding="utf-8") as corpus,
        (folder / "queries.jsonl").open("w", encoding="utf-8") as queries,
        (folder / "texts.jsonl").open("w", encoding="utf-8") as texts,
        (folder / "qrels" / "dev.tsv").open("w", encoding="utf-8") as dev,
        (folder / "qrels" / "test.tsv").open("w", encoding="utf-8") as test,
    ):
        judged = {"dev": dev, "test": test}
        for file in judged.values():
            file.write("query-id\tcorpus-id\tscore\n")
        groups = []
        for row, function in enumerate(functions):
            title = f"{function.module}.{function.name}"
            corpus.write(json.dumps({"_id": f"f{row}", "title": "", "text": function.code, "name": title}) + "\n")
            queries.write(json.dumps({"_id": f"q{row}", "text": function.query}) + "\n")
            split = split_of(function.module)
            if split in judged:
                judged[split].write(f"q{row}\tf{row}\t1\n")
                continue
            for role, text in (("query", function.query), ("passage", function.code)):
                texts.write(json.dumps({"role": role, "text": text}) + "\n")
            # Functions of the same package are the ones to be distinguished from.
            near = neighbours[function.module.rpartition(".")[0] or function.module]
            at = near.index(row)
            others = [near[(at + offset) % len(near)] for offset in range(1, min(NEGATIVES + 1, len(near)))]
            groups.append(
                {"query_id": f"q{row}", "positives": [f"f{row}"], "negatives": [f"f{other}" for other in others]}
            )
    judged_groups = random.Random(JUDGED).sample(groups, min(JUDGED, len(groups)))
    (folder / "train.jsonl").write_text("".join(json.dumps(group) + "\n" for group in judged_groups), "utf-8")
