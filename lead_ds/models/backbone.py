"""Loading a Hugging Face model safely: safetensors only, no remote code, one line when it cannot be done.

Works inside an active `HfDeepSpeedConfig`, where parameters are sharded by ZeRO-3 as they are read: nothing here looks at
a parameter's shape or data without gathering it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lead_ds.errors import InputError, LeadError
from lead_ds.io.hub import hub_settings
from lead_ds.io.located import find_file, located
from lead_ds.models.files import read_json, static_folder, transformer_folder
from lead_ds.models.merging import merge_adapter
from lead_ds.models.quiet import quiet
from lead_ds.models.special_weights import check_quantised
from lead_ds.models.static import StaticModel, static_shape
from lead_ds.settings.model import ModelConfig

Family = Literal["base", "classifier", "causal", "masked", "seq2seq"]

# Encoders that are read without the decoder that they were trained with, as sentence-transformers reads them.
_ENCODERS = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "longt5": "LongT5EncoderModel",
}


def read_model_config(config: ModelConfig, subfolder: str | None = None) -> Any:
    """The model's own (transformers) configuration, without its weights.

    Raises InputError: no such directory, no model in it, an unknown architecture, a hub name that cannot be reached.
    """
    from transformers import AutoConfig

    _check_path(config)
    if static_folder(config.path) is not None:
        return static_shape(config.path)
    if subfolder is None:
        subfolder = transformer_folder(config.path)
    check_code(config, subfolder)
    with _one_line_errors(config):
        shape = AutoConfig.from_pretrained(
            located(config.path),
            subfolder=subfolder,
            trust_remote_code=bool(config.trust_remote_code),
            **hub_settings(config.path),
        )
    if getattr(shape, "is_encoder_decoder", False) and shape.model_type not in _ENCODERS:
        remedy = f"use an encoder or a decoder, or one of {', '.join(_ENCODERS)}"
        raise InputError(config.path, f"{shape.model_type} is an encoder-decoder", remedy)
    sees = [name for name in ("vision_config", "audio_config") if getattr(shape, name, None)]
    if sees:
        what = f"{shape.model_type} reads images or sound as well ({sees[0]}): only models of text are read"
        raise InputError(config.path, what, "use a text model")
    return shape


def auto_class(shape: Any, family: Family) -> Any:
    """The class of transformers that loads a model of this configuration with a head; of T5, its encoder."""
    import transformers

    if family == "base" and shape.model_type in _ENCODERS:
        return getattr(transformers, _ENCODERS[shape.model_type])
    return {
        "base": transformers.AutoModel,
        "classifier": transformers.AutoModelForSequenceClassification,
        "causal": transformers.AutoModelForCausalLM,
        "masked": transformers.AutoModelForMaskedLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
    }[family]


def load_model(
    config: ModelConfig, family: Family, dtype: torch.dtype, depth: int | None = None, *, new_head: bool = False
) -> Any:
    """A transformers model, in evaluation mode, its weights in `dtype`; with `depth`, of its first layers only.

    family: "base" (AutoModel), "classifier" (AutoModelForSequenceClassification), "causal" (AutoModelForCausalLM), "masked"
    (AutoModelForMaskedLM) or "seq2seq" (AutoModelForSeq2SeqLM).
    new_head: a missing classification head is initialised. Every other missing weight is an InputError, as is a path
    that is not a model, pickled weights without `allow_pickle`, or code without `trust_remote_code`.
    """
    if config.weights == "pretrained":
        merge_adapter(config.path, trust_remote_code=bool(config.trust_remote_code), allow_pickle=config.allow_pickle)
    subfolder = transformer_folder(config.path)
    shape = read_model_config(config, subfolder)
    if depth is not None:
        cut_shape(shape, range(min(depth, shape.get_text_config().num_hidden_layers)))
    if family == "classifier" and not has_classifier(shape):
        if not new_head and config.weights == "pretrained":
            raise _no_head(config, shape)
        shape.num_labels = 1
    if config.weights == "pretrained":
        check_quantised(shape, config.path)
    auto = auto_class(shape, family)
    settings: dict[str, Any] = {"dtype": dtype}
    if config.attention != "auto":  # auto: transformers takes sdpa where the architecture has it
        settings["attn_implementation"] = config.attention
    with _one_line_errors(config), quiet():
        if config.weights == "random":
            return blank_model(shape, family, config, **settings).eval()
        settings["trust_remote_code"] = bool(config.trust_remote_code)
        settings |= hub_settings(config.path) | {"config": shape, "subfolder": subfolder, "output_loading_info": True}
        settings["use_safetensors"] = None if config.allow_pickle else True
        model, info = auto.from_pretrained(located(config.path), **settings)
        missing = _missing(info)
    lost = _backbone_missing(model, missing)
    if lost:
        raise InputError(
            config.path, f"its weights lack {len(lost)} parameters of a {shape.model_type}, such as {lost[0]}"
        )
    headless = sorted(missing - set(lost))
    if headless and family in ("causal", "masked"):
        raise InputError(
            config.path, f"its weights lack the language-model head ({headless[0]})", "use another kind or model"
        )
    if headless and family == "classifier" and not new_head:
        raise _no_head(config, shape)
    return model.eval()


def blank_model(shape: Any, family: Family, config: ModelConfig, **settings: Any) -> Any:
    """A model of a configuration, without its weights."""
    if shape.model_type == "static":
        return StaticModel(shape)
    auto = auto_class(shape, family)
    if hasattr(auto, "from_config"):
        return auto.from_config(shape, trust_remote_code=bool(config.trust_remote_code), **settings)
    return auto._from_config(shape, **settings)


def has_classifier(shape: Any) -> bool:
    """Whether, by its configuration, a model was saved with a classification head."""
    return any("ForSequenceClassification" in str(name) for name in shape.architectures or ())


def is_decoder(shape: Any) -> bool:
    """Whether a model reads from left to right: a language model that is not a masked one."""
    from transformers.models.auto import modeling_auto as auto

    kind = shape.get_text_config().model_type
    causal, masked = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return (kind in causal and kind not in masked) or bool(getattr(shape, "is_decoder", False))


def keep_layers(model: Any, layers: Sequence[int], path: str) -> None:
    """Keep only `layers` of a model, in that order, and let its configuration say so. In place; ZeRO-3 safe.

    Per-layer lists of the configuration (layer_types and the like) are cut alongside. InputError for an index it lacks.
    """
    name, old = find_layers(model)
    total = len(old)
    check_layers(layers, total, path)
    owner: Any = model.get_submodule(name.rpartition(".")[0])
    if model.config.model_type in _ENCODERS and layers[0] != 0:
        what = f"layer 0 of a {model.config.model_type} holds the positions that all of its layers read"
        raise InputError(path, what, "let student.layers begin with 0")
    kept = nn.ModuleList([old[i] for i in layers])
    # Some architectures give their first layer a part less (ModernBERT: no norm after the embeddings' own); a shallower
    # model must have that shape too, or it could not be loaded again.
    for part, module in old[0].named_children():
        if isinstance(module, nn.Identity) and not isinstance(getattr(kept[0], part), nn.Identity):
            setattr(kept[0], part, nn.Identity())
    setattr(owner, name.rpartition(".")[2], kept)
    for i, layer in enumerate(kept):
        for child in layer.modules():
            if hasattr(child, "layer_idx"):
                setattr(child, "layer_idx", i)  # noqa: B010 - the type says Tensor or Module
    cut_shape(model.config, layers)
    if hasattr(owner, "n_layers"):  # DistilBERT
        owner.n_layers = len(kept)


def cut_shape(config: Any, layers: Sequence[int]) -> None:
    """Let a model's configuration have `layers` only, its per-layer lists cut alongside. In place."""
    shape = config.get_text_config()
    for key, value in list(vars(shape).items()):
        if "layer" in key and isinstance(value, (list, tuple)) and len(value) == shape.num_hidden_layers:
            setattr(shape, key, type(value)(value[i] for i in layers))
    shape.num_hidden_layers = len(layers)


def find_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The transformer layers of a model and their name: the ModuleList as long as its configuration has it."""
    total = model.config.get_text_config().num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == total and not ({"vision", "audio"} & set(_words(name)))
    ]
    if not found:
        raise InputError(
            getattr(model.config, "_name_or_path", "") or type(model).__name__,
            f"the {total} layers of a {model.config.model_type} were not found",
            "its layers must be a list of modules of their own",
        )
    return min(found, key=lambda item: item[0].count("."))


def checkpoint_activations(model: Any) -> None:
    """Have a transformers model compute activations again in the backward pass instead of keeping them."""
    how = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name that stays from transformers 6 on
        model.activation_checkpointing_enable(how)
    else:
        model.gradient_checkpointing_enable(how)


def check_layers(layers: Sequence[int], total: int, path: str) -> None:
    """InputError where an index is not one of a model's layers."""
    for i in layers:
        if not 0 <= i < total:
            raise InputError(path, f"layer {i} was requested of a model with {total} layers", f"0 to {total - 1}")


def check_code(config: ModelConfig, folder: str) -> None:
    """Refuse a model or tokenizer with code of its own unless it is said whether that code is run.

    Where transformers knows the architecture as well, either reading gives numbers, and they are not the same.
    """
    for name in ("config.json", "tokenizer_config.json"):
        tree = read_json(config.path, f"{folder}/{name}".lstrip("/"))
        if tree.get("auto_map") and config.trust_remote_code is None:
            what = f"comes with Python code of its own (auto_map in {name})"
            remedy = "set trust_remote_code: true if you have read it, or false to read it with transformers' own code"
            raise InputError(config.path, what, remedy)


def _words(name: str) -> list[str]:
    return name.replace("_", ".").split(".")


def _missing(info: dict[str, Any]) -> set[str]:
    mismatched = {item[0] if isinstance(item, tuple) else item for item in info.get("mismatched_keys", ())}
    return set(info.get("missing_keys", ())) | mismatched


def _backbone_missing(model: Any, missing: set[str]) -> list[str]:
    """Missing weights of the layers and embeddings; poolers and heads are judged by who needs them."""
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    return sorted(key for key in missing if key.startswith(prefix) and "pooler" not in _words(key))


def _no_head(config: ModelConfig, shape: Any) -> InputError:
    return InputError(
        config.path,
        f"a {shape.model_type} without a trained scoring head cannot be this teacher",
        "train one with `lead-ds warmup`, or choose another kind",
    )


def _check_path(config: ModelConfig) -> None:
    """Refuse, before the hub is contacted, what is plainly a local path that holds no model."""
    folder = Path(config.path)
    if folder.is_dir():
        if find_file(config.path, "config.json") is None and find_file(config.path, "modules.json") is None:
            what = "not a model: it has no config.json"
            raise InputError(config.path, what, "name a directory that transformers or sentence-transformers saved")
    elif folder.exists():
        raise InputError(config.path, "not a model directory but a file")
    elif folder.is_absolute() or config.path.startswith((".", "~")) or len(folder.parts) > 2 or not config.path:
        raise InputError(config.path or "path", "no such model directory")


@contextmanager
def _one_line_errors(config: ModelConfig) -> Iterator[None]:
    """Turn what transformers and safetensors raise for a bad model into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise InputError(config.path, f"damaged weights: {error}") from error
    except (LeadError, MemoryError):
        raise
    except Exception as error:  # a foreign directory can be wrong in any way
        # Others are of memory, a device or a lost rank: not the input's fault, and worth another try.
        if isinstance(error, RuntimeError) and not any(
            word in str(error) for word in ("mismatch", "negative dimension")
        ):
            raise
        text = str(error)
        if "trust_remote_code" in text:
            what, remedy = "comes with Python code of its own", "set trust_remote_code: true if you have read it"
        elif not config.allow_pickle and _pickle_only(config):
            what, remedy = (
                "its weights come as pickle only, which can run code",
                "set allow_pickle: true if you trust it",
            )
        elif isinstance(error, OSError) and not Path(config.path).is_dir():
            what, remedy = "no such directory, and not found on the hub", "check the name and the network"
        elif isinstance(error, OSError):
            what, remedy = "not a complete model: config.json or model.safetensors is absent or unreadable", ""
        elif "Padding_idx must be within" in text:
            what = "the pad_token_id of its config.json is beyond its table of words"
            remedy = "set it to the id of padding in its tokenizer, below vocab_size"
        elif "ignore_mismatched_sizes" in text:  # transformers speaks of a report that nobody sees
            what = "has weights of other shapes than its config.json gives"
            remedy = "see that both are of one model: vocab_size, hidden_size, num_labels"
        else:
            lines = text.strip().splitlines() or [type(error).__name__]
            reason = " ".join(" ".join(lines[: 1 + lines[0].endswith(":")]).split())  # "Validation error for ...:"
            what, remedy = f"cannot be loaded: {reason}", ""
        raise InputError(config.path, what, remedy) from error


def _pickle_only(config: ModelConfig) -> bool:
    names = ("model.safetensors", "model.safetensors.index.json")
    subfolder = transformer_folder(config.path)
    prefix = f"{subfolder}/" if subfolder else ""
    if any(find_file(config.path, prefix + name) for name in names):
        return False
    pickles = ("pytorch_model.bin", "pytorch_model.bin.index.json")
    return any(find_file(config.path, prefix + name) for name in pickles)
