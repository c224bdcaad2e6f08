"""The list of keys is whole: the installed sentence-transformers writes none that stands in no list."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lead_ds.config import TeacherConfig
from lead_ds.errors import InputError
from lead_ds.models.files import REFUSED_MODULES
from lead_ds.models.inventory import FILES, MODULES, check_keys, unread
from lead_ds.models.load import load_text
from tests.formats.format import change
from tests.formats.formats import FORMATS
from tests.models.tiny_models import tiny_model

FAMILIES = ("base", "sentence_transformer", "cross_encoder", "multi_vector_encoder", "sparse_encoder")


def modules() -> Iterator[tuple[str, Any]]:
    """Every class of module that the installed sentence-transformers brings."""
    from sentence_transformers.base.modules.module import Module

    for family in FAMILIES:
        for name, found in vars(importlib.import_module(f"sentence_transformers.{family}.modules")).items():
            if inspect.isclass(found) and issubclass(found, Module) and name not in ("Module", "InputModule"):
                yield name, found


def test_every_key_of_every_module_is_in_a_list() -> None:
    unlisted = {}
    for name, found in modules():
        if name in ("Transformer", "MLMTransformer"):
            known = FILES["sentence_bert_config.json"].known
        elif name in MODULES:
            known = MODULES[name].known
        else:
            assert name in REFUSED_MODULES, f"{name} of sentence-transformers is neither read nor refused"
            continue
        keys = {*found.config_keys, *found.config_key_renames} - known
        if keys:
            unlisted[name] = keys
    assert not unlisted


@pytest.mark.parametrize("family", ["SentenceTransformer", "CrossEncoder", "MultiVectorEncoder", "SparseEncoder"])
def test_every_key_that_a_family_writes_of_itself_is_in_a_list(family: str) -> None:
    import sentence_transformers

    source = inspect.getsource(getattr(sentence_transformers, family)._get_model_config)
    source += inspect.getsource(sentence_transformers.SentenceTransformer.__mro__[1]._get_model_config)
    written = {word.strip('"') for word in re.findall(r'"\w+"(?=:|\])', source)}
    assert (
        written - {"sentence_transformers", "transformers", "pytorch"}
        <= FILES["config_sentence_transformers.json"].known
    )


SAVED = {
    "MiniLM: mean, unit length": {},
    "cross-encoder: a default prompt": {},
    "ColBERT: fixed expansion, skiplist, prompts": {},
    "StaticEmbedding, Dense, unit length, prompts": {},
}


@pytest.mark.parametrize("name", SAVED)
def test_what_is_saved_has_no_other_key(tmp_path: Path, name: str) -> None:
    path = FORMATS[name].write(tmp_path)
    check_keys(path)
    for file, keys in FILES.items():
        if (Path(path) / file).exists():
            tree = json.loads((Path(path) / file).read_text())
            for entry in tree if isinstance(tree, list) else [tree]:
                assert set(entry) <= keys.known, file


@pytest.mark.parametrize(
    "file", ["config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json", "modules.json"]
)
def test_a_key_that_nobody_knows_is_refused_by_name(tmp_path: Path, file: str) -> None:
    path = FORMATS["MiniLM: mean, unit length"].write(tmp_path)
    if file == "modules.json":
        tree = json.loads((Path(path) / file).read_text())
        (Path(path) / file).write_text(json.dumps([tree[0] | {"twice": True}, *tree[1:]]))
    else:
        check_keys(change(path, file, twice=False))  # empty: says nothing
        change(path, file, twice=True)
    with pytest.raises(InputError, match=f"{file}: the key twice is not known here"):
        load_text(TeacherConfig(kind="dual_encoder", path=path))


def test_a_key_that_is_refused_and_one_that_no_class_reads(tmp_path: Path) -> None:
    path = FORMATS["MiniLM: mean, unit length"].write(tmp_path)
    change(path, "sentence_bert_config.json", config_kwargs={"num_hidden_layers": 1})
    with pytest.raises(InputError, match="the key num_hidden_layers is not known"):
        check_keys(path)
    change(path, "sentence_bert_config.json", config_kwargs=None, tokenizer_name_or_path="elsewhere")
    with pytest.raises(InputError, match="its tokenizer lies elsewhere"):
        check_keys(path)
    import transformers

    plain = tiny_model(tmp_path / "plain", "bert", layers=1)
    change(plain, "config.json", attends_backwards=True)
    assert unread(plain, transformers.AutoConfig.from_pretrained(plain)) == ["attends_backwards"]
