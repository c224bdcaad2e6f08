"""Two models in one directory: one reads queries, the other documents, and their vectors live in one space.

`query/` and `document/` are whole directories, each readable alone. `router_config.json` leads sentence-transformers' Router to
the modules in them, so that `SentenceTransformer(directory)` encodes queries with the one and documents with the other.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.errors import InputError
from lead_ds.io.files import read_json
from lead_ds.models.export import export_sentence_transformers
from lead_ds.models.files import ROUTER, saved_types
from lead_ds.models.kinds.kind import Kind
from lead_ds.models.student_dir import vacant, whole_folder

SIDES = ("query", "document")
_CARD = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, dense-retrieval, lead-ds]
---

# Queries by `{query}`, documents by `{document}`

```python
from sentence_transformers import SentenceTransformer
model = SentenceTransformer("this directory")
queries = model.encode_query(["what is late interaction?"])
passages = model.encode_document(["ColBERT compares every query token with every passage token."])
print(model.similarity(queries, passages))
```

Each of `query/` and `document/` is a model of its own. `lead-ds encode`, `search` and `evaluate` take this directory as
`--model`.
"""

Reader = tuple[Kind, TextEncoder]
"""A model in evaluation mode, and how it reads text."""


def routes(path: str | Path) -> tuple[str, str] | None:
    """The directories of the two models in a Router's directory, of queries and of documents; None for one model.

    Raises InputError for a Router of another form.
    """
    types = saved_types(str(path))
    if not any(kind.rsplit(".", 1)[-1] == ROUTER for kind in types):
        return None
    folders = [Path(path).expanduser() / side for side in SIDES]
    if len(types) > 1 or not all((folder / "modules.json").is_file() for folder in folders):
        what = "is a Router of another form than lead-ds export --to router writes"
        raise InputError(path, what, "give its two models: --query-model and --document-model")
    return str(folders[0]), str(folders[1])


def check_space(query: Reader, document: Reader) -> None:
    """Raise InputError unless the vectors of both models have one width."""
    (q, _), (d, _) = query, document
    if q.sparse != d.sparse:
        what = "gives sparse vectors" if q.sparse else "gives dense vectors"
        raise InputError(q.config.path, f"{what}, {d.config.path} does not", "use two models of one kind")
    if q.features_width != d.features_width:
        what = f"gives vectors of {q.features_width} dimensions, {d.config.path} of {d.features_width}"
        remedy = "distil it into the teacher's space: losses.embedding.keep: true, or student.projection"
        raise InputError(q.config.path, what, remedy)


def save_router(query: tuple[str, Reader], document: tuple[str, Reader], out: str | Path) -> Path:
    """Write two models, each by its path and as it was read, to the folder `out` as one Router, whole or not at all.

    Raises InputError for vectors of different widths, and for a folder that is not empty.
    """
    check_space(query[1], document[1])
    query[1][0].refuse_sparse(query[0], "a Router of ours is of dense ones")
    out = vacant(out)
    with whole_folder(out) as made:
        types: dict[str, str] = {}
        structure: dict[str, list[str]] = {}
        for side, (path, _) in zip(SIDES, (query, document), strict=True):
            _put(path, made / side)
            modules = json.loads((made / side / "modules.json").read_text("utf-8"))
            structure[side] = [f"{side}/{module['path']}".rstrip("/") for module in modules]
            types |= dict(zip(structure[side], (module["type"] for module in modules), strict=True))
        parameters = {"default_route": "document", "allow_empty_key": True, "route_mappings": {}}
        _write(made / "router_config.json", {"types": types, "structure": structure, "parameters": parameters})
        router = "sentence_transformers.base.modules.router.Router"
        _write(made / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": router}])
        config = read_json(made / "document" / "config_sentence_transformers.json", "export the document model first")
        prompts = {"query": query[1][1].query_prompt, "document": document[1][1].passage_prompt}
        _write(made / "config_sentence_transformers.json", {**config, "prompts": prompts, "default_prompt_name": None})
        names = {side: Path(path).name for side, (path, _) in zip(SIDES, (query, document), strict=True)}
        (made / "README.md").write_text(_CARD.format(**names), encoding="utf-8")
    return out


def _put(path: str, folder: Path) -> None:
    """A model's directory as sentence-transformers keeps one: copied where it is such, so that it stays the same files."""
    source = Path(path).expanduser()
    if (source / "modules.json").is_file():
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns(".*", "checkpoint*", "onnx"))
    else:
        export_sentence_transformers(path, folder)


def _write(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
