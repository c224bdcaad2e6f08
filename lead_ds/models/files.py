"""What the files beside a model's weights say of it: who saved it, which modules, and what this project recorded."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Any

from lead_ds.errors import InputError
from lead_ds.io.adapters import LONGEST
from lead_ds.io.json_text import parse_json
from lead_ds.io.located import find_file

RECORD = "lead_ds.json"  # what this project adds to a model's directory: kind, lengths, scale, prompts of pairs

# Of sentence-transformers' modules, those that work on token states or on a vector alone: a layer's state can be put through.
_READ = (
    "Transformer",
    "MLMTransformer",
    "SpladePooling",
    "StaticEmbedding",
    "Pooling",
    "Dense",
    "Normalize",
    "LayerNorm",
    "Dropout",
    "MultiVectorMask",
    "LogitScore",
)

# Of what is read here, not by the library that wrote it.
_KINDS: dict[str, dict[str, type]] = {
    RECORD: {"kind": str, "query_length": int, "passage_length": int, "max_length": int, "prompts": dict, "dims": list},
    "config_sentence_transformers.json": {"prompts": dict, "default_prompt_name": str, "similarity_fn_name": str},
    "sentence_bert_config.json": {"max_seq_length": int},
    "config.json": {"architectures": list, "model_type": str},
}

_NO_LAYERS = "has no transformer whose layers could be read"
REFUSED_MODULES = {
    **dict.fromkeys(("BoW", "WordEmbeddings", "WordWeights", "CNN", "LSTM"), _NO_LAYERS),
    "WeightedLayerPooling": "reads several layers at once",
    "CLIPModel": "reads images as well",
    "SparseAutoEncoder": "makes sparse vectors of another kind than SPLADE's",
    "SparseStaticEmbedding": "makes sparse vectors of another kind than SPLADE's",
    "HierarchicalTokenPooling": "merges tokens of a passage by clustering",
    "LambdaTokenPooling": "merges tokens of a passage by code of its own",
    "BaseTokenPooling": "merges tokens of a passage",
    "Router": "has a way for queries and another for passages",
    "Asym": "has a way for queries and another for passages",
}
"""Modules of sentence-transformers that are not read, and why."""


def read_json(path: str, name: str) -> dict[str, Any]:
    """A JSON object of a directory or hub repository; empty where it is absent. InputError where it is not a JSON
    object."""
    tree = _read(path, name)
    if tree is not None and not isinstance(tree, dict):
        raise InputError(find_file(path, name), "not a JSON object", "restore the model's file")
    tree = tree or {}
    for key, kind in _KINDS.get(Path(name).name, {}).items():
        if not isinstance(tree.get(key), (kind, NoneType)):
            what = f"{key} is a {type(tree[key]).__name__}, not a {kind.__name__}"
            raise InputError(find_file(path, name), what, "restore the model's file")
    return tree


ROUTER = "Router"


def saved_types(path: str) -> list[str]:
    """The classes of the modules that modules.json names, as it names them; none where there is no such file."""
    tree = _read(path, "modules.json")
    named = tree if isinstance(tree, list) else []
    return [str(module.get("type")) for module in named if isinstance(module, dict)]


def saved_modules(path: str) -> list[tuple[str, str]]:
    """(class, folder) of each module that modules.json names, in order; none where there is no such file.

    Raises InputError for a module through which a layer's state cannot be put: leaving it out would change what is read.
    """
    tree = _read(path, "modules.json")
    if tree is None:
        return []
    file = find_file(path, "modules.json")
    if not isinstance(tree, list) or not all(isinstance(m, dict) and isinstance(m.get("type"), str) for m in tree):
        raise InputError(file, "not a list of modules with a type")
    names = [module["name"] for module in tree if isinstance(module.get("name"), str)]
    if len(set(names)) < len(names):  # sentence-transformers would keep the last of them
        raise InputError(file, "gives two modules one name", "number them as sentence-transformers does")
    found = []
    for module in tree:
        kind, folder = module["type"].rsplit(".", 1)[-1], str(module.get("path", ""))
        if ".." in Path(folder).parts or Path(folder).is_absolute():
            raise InputError(file, f"module path {folder!r} leaves the directory")
        if len(folder) > LONGEST:
            raise InputError(file, f"module path {folder[:20]}... is longer than a name can be")
        if kind == ROUTER:
            what = "holds two models, of queries and of documents"
            raise InputError(
                path, what, f"name one of them, such as {path}/query; encode, search and evaluate take both"
            )
        if not module["type"].startswith(("sentence_transformers.", "pylate.")):
            what = f"module {module['type']} is code of its own, which is not run here"
            raise InputError(file, what, "use a model of sentence-transformers' modules")
        if kind not in _READ:
            why = REFUSED_MODULES.get(kind)
            what = f"module {module['type']} is not supported" + (f": it {why}" if why else "")
            raise InputError(file, what, f"{', '.join(_READ)} are")
        found.append((kind, folder))
    if not found or found[0][0] not in ("Transformer", "MLMTransformer", "StaticEmbedding"):
        raise InputError(file, "its first module is not a Transformer", "there are no layers to read")
    return found


def static_folder(path: str) -> str | None:
    """Where the token vectors of a StaticEmbedding are; None for a model of another kind."""
    modules = saved_modules(path)
    if modules:
        return modules[0][1].strip("./") if modules[0][0] == "StaticEmbedding" else None
    return "" if read_json(path, "config.json").get("model_type") == "model2vec" else None


def transformer_folder(path: str) -> str:
    """Where in a directory or repository the transformer's files are: mostly at its top."""
    modules = saved_modules(path)
    return modules[0][1] if modules else ""


def logit_score(path: str) -> dict[str, Any] | None:
    """What sentence-transformers' LogitScore module says of a language model's answers; None where there is none."""
    folder = next((folder for kind, folder in saved_modules(path) if kind == "LogitScore"), None)
    return None if folder is None else read_json(path, f"{folder}/config.json")


def family_of(path: str) -> str | None:
    """The class of sentence-transformers that reads a directory: SentenceTransformer, MultiVectorEncoder, CrossEncoder,
    SparseEncoder; None where it holds a plain model of transformers."""
    said = read_json(path, "config_sentence_transformers.json").get("model_type")
    if said is not None:
        return "MultiVectorEncoder" if said == "ColBERT" else str(said)  # PyLate's name
    modules = [kind for kind, _ in saved_modules(path)]
    if "LogitScore" in modules:
        return "CrossEncoder"
    if "SpladePooling" in modules:
        return "SparseEncoder"
    if modules:
        vectors = "Pooling" in modules or "StaticEmbedding" in modules
        return "SentenceTransformer" if vectors else "MultiVectorEncoder"
    architectures = read_json(path, "config.json").get("architectures") or ()
    return "MultiVectorEncoder" if "HF_ColBERT" in architectures else None


def _read(path: str, name: str) -> Any:
    file = find_file(path, name)
    if file is None:
        return None
    try:
        tree = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(file, f"not readable as JSON: {error}", "restore the model's file") from None
    if tree is None:
        raise InputError(file, "holds null", "restore the model's file")
    return tree
