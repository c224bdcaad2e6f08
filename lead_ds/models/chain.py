"""A model's directory as sentence-transformers reads and writes it, the weights of its transformer apart.

Those are read by `lead_ds.models.backbone.load_model`: sharded as they come, truncated, random or cut, and judged by what is
missing. Here sentence-transformers reads all the rest: the modules behind the transformer, prompts, lengths, tokenizer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lead_ds.data.tokens.tokenizer import blank_tokenizer, load_tokenizer
from lead_ds.errors import InputError, LeadError
from lead_ds.io.hub import hub_settings
from lead_ds.io.located import find_file, located
from lead_ds.models.backbone import Family, read_model_config
from lead_ds.models.files import family_of, read_json, saved_modules, transformer_folder
from lead_ds.models.library import heavy_later, sentence_transformers
from lead_ds.models.quiet import quiet
from lead_ds.settings.model import ModelConfig

_TASKS: dict[Family, str] = {
    "base": "feature-extraction",
    "classifier": "sequence-classification",
    "causal": "text-generation",
    "masked": "fill-mask",
    "seq2seq": "feature-extraction",  # sentence-transformers has no task of it
}


def open_chain(config: ModelConfig, family: str, head: Family = "base", *, text: bool = False) -> Any:
    """The modules of a model, as `family` (a class of sentence-transformers) reads its directory; its transformer alone where
    the directory was not saved by that family, with the head `head`.

    text: with its tokenizer, and no weights at all; otherwise with the weights of its modules, and no tokenizer. In neither
    case with those of the transformer. Raises InputError for what cannot be read, or would be read otherwise than there.
    """
    library = sentence_transformers()
    from sentence_transformers.base.modules import Transformer

    saved = family_of(config.path) == family
    if saved:
        _check(config, family)
    folder = transformer_folder(config.path)
    shape = read_model_config(config, folder)
    where = hub_settings(config.path) | {"trust_remote_code": bool(config.trust_remote_code)}
    settings: dict[str, Any] = {"device": str(torch.get_default_device())}
    weights = not text and config.weights == "pretrained"
    with heavy_later(), _one_line_errors(config), quiet(), _apart(config, shape, text=text, weights=weights):
        if saved:
            return getattr(library, family)(located(config.path), **where, **settings)
        inside = where | {"subfolder": folder}
        transformer = Transformer(
            located(config.path),
            transformer_task=_TASKS[head],  # type: ignore[arg-type]
            config_kwargs=dict(inside),
            processor_kwargs=dict(inside),
        )
        return getattr(library, family)(modules=[transformer], **settings)


_STATES = ("forward", "last_hidden_state", "token_embeddings")  # how sentence-transformers' Transformer is read


def finished_output(path: str) -> str | None:
    """Of a model that gives one vector a text by itself: how its output names it, as sentence-transformers has it; else None."""
    own = read_json(path, f"{transformer_folder(path)}/sentence_bert_config.json".lstrip("/"))
    text = own.get("modality_config", {}).get("text", {})
    how = (text.get("method"), text.get("method_output_name"), own.get("module_output_name"))
    if how in (_STATES, (None, None, None)):
        return None
    if how[0] != "forward" or how[2] != "sentence_embedding" or not isinstance(how[1], str):
        return ""
    return how[1]


def save_chain(chain: Any, folder: str, tokenizer: Any, states: Sequence[tuple[nn.Module, dict[str, Any]]]) -> None:
    """Write a directory as sentence-transformers writes it. states: the weights to write for a module, which may be sharded."""
    chain[0].processor = tokenizer
    try:
        for module, state in states:
            module.state_dict = lambda *_, _state=state, **__: _state  # type: ignore[method-assign,assignment]
        with quiet():
            chain.save_pretrained(folder, create_model_card=False)
    finally:
        for module, _ in states:
            del module.state_dict


def replace_modules(chain: Any, modules: Iterable[nn.Module]) -> None:
    """Let a chain have `modules` behind its transformer. In place."""
    del chain[1:]
    chain.extend(modules)


class _Unread(nn.Module):
    """A transformer whose weights are read later."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, input_ids: Any = None, attention_mask: Any = None, token_type_ids: Any = None) -> Any:
        raise NotImplementedError


@contextmanager
def _apart(config: ModelConfig, shape: Any, *, text: bool, weights: bool) -> Iterator[None]:
    """Let sentence-transformers read everything but the transformer, and only what is requested of the rest.

    It has no switch for that: the three functions that read files are replaced meanwhile.
    """
    from sentence_transformers.base.modules import transformer
    from sentence_transformers.base.modules.module import Module

    def tokenizer(_: str, subfolder: str = "", model_max_length: int | None = None, **more: Any) -> Any:
        if not text:
            return blank_tokenizer()
        found = load_tokenizer(config.path, subfolder, bool(config.trust_remote_code))
        if model_max_length is not None:
            found.model_max_length = model_max_length
        return found

    def no_weights(cls: type, *_: Any, model: Any = None, **__: Any) -> Any:
        if model is not None:
            return model
        dim = read_json(config.path, "artifact.metadata").get("dim", 128)  # of the original ColBERT's projection
        return {"linear.weight": torch.zeros(dim, shape.hidden_size)}

    own = transformer.Transformer
    kept = own._load_model, own._validate_query_expansion_token, transformer.AutoProcessor
    load_weights = Module.__dict__["load_torch_weights"]
    own._load_model = lambda *_, **__: _Unread(shape)  # type: ignore[method-assign,assignment]
    transformer.AutoProcessor = SimpleNamespace(from_pretrained=tokenizer)  # type: ignore[assignment,misc]
    if not text:
        own._validate_query_expansion_token = lambda *_: None  # type: ignore[method-assign,assignment]
    if not weights:
        Module.load_torch_weights = classmethod(no_weights)  # type: ignore[method-assign,assignment]
    try:
        with torch.random.fork_rng(devices=[]):  # what is drawn before weights are read over it changes no later draw
            yield
    finally:
        own._load_model, own._validate_query_expansion_token, transformer.AutoProcessor = kept  # type: ignore[method-assign,misc]
        Module.load_torch_weights = load_weights  # type: ignore[method-assign]


def _check(config: ModelConfig, family: str) -> None:
    """Refuse what sentence-transformers reads in another way than lead-ds would."""
    for kind, folder in saved_modules(config.path):
        where = f"{config.path}/{folder}"
        tree = read_json(config.path, f"{folder}/config.json") if folder else {}
        activation = str(tree.get("activation_function") or "torch.")
        if kind == "Dense" and not activation.startswith("torch.") and not config.trust_remote_code:
            raise InputError(f"{where}/config.json", f"activation {activation} is not supported")
        pickled = find_file(config.path, f"{folder}/pytorch_model.bin") and folder
        if pickled and not config.allow_pickle and find_file(config.path, f"{folder}/model.safetensors") is None:
            what = "its weights come as pickle only, which can run code"
            raise InputError(where, what, "set allow_pickle: true if you trust it")
    own = read_json(config.path, f"{transformer_folder(config.path)}/sentence_bert_config.json".lstrip("/"))
    output = finished_output(config.path) if family == "SentenceTransformer" else None
    if output is not None and not (output and config.trust_remote_code):
        what = (
            "reads another output than the states of tokens (modality_config), which is done of code of its own alone"
        )
        raise InputError(
            f"{config.path}/sentence_bert_config.json", what, "save it with Pooling behind its transformer"
        )
    if "message" in own.get("modality_config", {}) and family not in ("CrossEncoder", "SentenceTransformer"):
        what = "reads texts through a chat template, which is done of a dual encoder and of pairs alone"
        raise InputError(f"{config.path}/sentence_bert_config.json", what, "save it with modality text alone")


@contextmanager
def _one_line_errors(config: ModelConfig) -> Iterator[None]:
    """Turn what sentence-transformers raises for a bad directory into one line."""
    logger = logging.getLogger("sentence_transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except LeadError:
        raise
    except Exception as error:  # a foreign directory can be wrong in any way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(config.path, f"sentence-transformers cannot read it: {reason[:200]}") from error
    finally:
        logger.setLevel(level)
