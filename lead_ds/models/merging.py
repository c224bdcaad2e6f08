"""The weights of an adapter and its base as those of one plain model: merged once, by peft, into a cached copy.

One process of a machine merges, while the others wait for it. What is loaded after that is an ordinary directory: sharded by
ZeRO-3 as it is read, cut to its first layers, fingerprinted.
"""

from __future__ import annotations

import copy
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lead_ds.errors import InputError, LeadError, RunError
from lead_ds.io.adapters import SETTINGS, Adapter, adapter_of
from lead_ds.io.located import architecture, located
from lead_ds.io.mapped import locked
from lead_ds.models.files import transformer_folder
from lead_ds.models.quiet import quiet

_MARK = "merged.json"
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save|original_module)\.")
_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")


def merge_adapter(path: str, *, trust_remote_code: bool = False, allow_pickle: bool = False) -> None:
    """Merge the adapter that `path` holds, if any, into its base, in the base's dtype, where no run has done so before.

    Not to be called by some processes of a run only: the others find nothing to load. Raises InputError for an adapter
    whose type peft cannot merge, that does not fit its base, or whose settings the installed peft does not know.
    """
    adapter = adapter_of(path)
    if adapter is None:
        return
    folder = Path(located(path))
    if (folder / _MARK).is_file():
        return
    if adapter.base != adapter.folder:
        merge_adapter(str(adapter.base), trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    peft = require_peft(path)
    with locked(folder):
        if (folder / _MARK).is_file():
            return
        try:
            with _one_line_errors(path), quiet(), _unsharded(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of peft and transformers; what matters is checked
                model = _Merge(adapter, peft, trust_remote_code, allow_pickle).model()
                _write(model, folder / transformer_folder(path))
            facts = {"adapter": path, "base": str(adapter.base), "peft": peft.__version__}
            (folder / _MARK).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
        except OSError as error:
            raise RunError(folder, f"cannot be written: {error}", "set LEAD_DS_CACHE to another folder") from error


def unmerged(path: str, *, trust_remote_code: bool = False, allow_pickle: bool = False) -> Any:
    """The adapter of `path` on its base as peft computes it, not merged, in float32: a transformers model with peft's layers
    in it. None where `path` holds none. Raises InputError as `merge_adapter`, which is called before."""
    adapter = adapter_of(path)
    if adapter is None:
        return None
    with _one_line_errors(path), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _Merge(adapter, require_peft(path), trust_remote_code, allow_pickle).adapted("float32").base_model.model


def adapter_facts(path: str) -> dict[str, Any] | None:
    """Of an adapter: its type, its base, its rank where it has one; None where `path` holds none."""
    adapter = adapter_of(path)
    if adapter is None:
        return None
    said = adapter.settings
    extras = [name for name in ("use_rslora", "use_dora", "modules_to_save") if said.get(name)]
    return {"type": said.get("peft_type"), "base": str(adapter.base), "r": said.get("r"), "with": extras}


class _Merge:
    def __init__(self, adapter: Adapter, peft: Any, trust: bool, pickle: bool) -> None:
        self.adapter, self.peft, self.trust = adapter, peft, trust
        if adapter.weights.suffix == ".bin" and not pickle:
            what = "the adapter's weights come as pickle, which can run code"
            raise InputError(adapter.weights, what, "set allow_pickle: true if you trust it")
        self.safe = None if pickle else True
        self.settings = self._settings()
        self.shapes = self._saved_shapes()

    def model(self) -> Any:
        """The merged model, on the CPU, in its base's dtype."""
        adapted = self.adapted("auto")
        merged = adapted.merge_and_unload()
        if set(merged.state_dict()) != self.before:
            odd = sorted(set(merged.state_dict()) ^ self.before)[0]
            raise InputError(self.adapter.place, f"{self._name}: peft cannot merge it whole ({odd} is left over)")
        odd = next((name for name, p in merged.named_parameters() if not torch.isfinite(p).all()), None)
        if odd is not None:
            raise InputError(
                self.adapter.place, f"merged into its base, {odd} is not finite", "train the adapter again"
            )
        return merged.to(self.dtype)

    def adapted(self, dtype: str) -> Any:
        """peft's model of the base and the adapter, on the CPU; the base is read in `dtype`."""
        adapter = self.adapter
        base = str(adapter.base) if adapter.base == adapter.folder else located(str(adapter.base))
        from transformers import AutoConfig

        where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": self.trust}
        where["subfolder"] = adapter.at if adapter.base == adapter.folder else transformer_folder(base)
        shape = AutoConfig.from_pretrained(base, **where)
        if getattr(shape, "quantization_config", None) is not None:
            what = "its base is quantised, and an adapter is merged in whole numbers of neither"
            raise InputError(adapter.place, what, "name the base as it was before, in base_model_name_or_path")
        if "HF_ColBERT" in (shape.architectures or ()):
            raise InputError(adapter.place, "its base is an original ColBERT, whose projection peft would not keep")
        labels = next((self.shapes[key][0] for key in self.shapes if key.endswith(_HEADS)), None)
        if labels is not None:
            shape.num_labels = labels
        auto = self._class(shape)
        where |= {"config": shape, "dtype": dtype, "use_safetensors": self.safe, "output_loading_info": True}
        with _without_adapter(base, where["subfolder"]) as plain:
            model, info = auto.from_pretrained(plain, **where)
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        rows = self._embedding_rows(model)
        if rows is not None:
            model.resize_token_embeddings(rows)
        self.before = set(model.state_dict())
        trained = self._trained(model)
        lost = sorted(set(info["missing_keys"]) - trained)
        lost = [key for key in lost if "pooler" not in key]
        if lost:
            what = f"its base lacks {len(lost)} weights, such as {lost[0]}, and the adapter does not bring them"
            raise InputError(adapter.place, what)
        return self._adapted(model).eval()

    @property
    def _name(self) -> str:
        return f"an adapter of type {self.adapter.settings.get('peft_type')}"

    def _settings(self) -> Any:
        """The adapter's settings as peft reads them, none of them ignored."""
        said, file = self.adapter.settings, self.adapter.place / SETTINGS
        types = {str(kind.value): kind for kind in self.peft.PeftType}
        if said.get("peft_type") not in types:
            what = f"{self._name} is not known to peft {self.peft.__version__}"
            raise InputError(file, what, "install a newer peft, or merge it yourself")
        settings = self.peft.PeftConfig.from_pretrained(str(self.adapter.place))
        if settings.is_prompt_learning or settings.is_adaption_prompt:
            raise InputError(file, f"{self._name} adds to the input of a model: it cannot be merged into weights")
        known = set(vars(settings)) | {"peft_version"}
        odd = sorted(key for key, value in said.items() if value and key not in known)
        if odd:
            what = f"{odd[0]} is not known to peft {self.peft.__version__}"
            raise InputError(file, what, "install a newer peft, or merge the adapter yourself")
        return settings

    def _saved_shapes(self) -> dict[str, list[int]]:
        """The shapes of the adapter's weights by name."""
        file = self.adapter.weights
        if file.suffix == ".bin":
            return {key: list(x.shape) for key, x in torch.load(file, map_location="cpu", weights_only=True).items()}
        from safetensors import safe_open

        with safe_open(file, framework="pt") as weights:
            return {key: list(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118

    def _class(self, shape: Any) -> Any:
        """The class of transformers whose weights, adapted, have the very names of the adapter's weights."""
        import transformers

        autos = {
            "ForSequenceClassification": transformers.AutoModelForSequenceClassification,
            "ForCausalLM": transformers.AutoModelForCausalLM,
            "ForMaskedLM": transformers.AutoModelForMaskedLM,
            "EncoderModel": transformers.AutoModelForTextEncoding,  # T5's encoder alone
            "": transformers.AutoModel,
        }
        named = architecture(self.adapter.settings, shape.to_dict()) or (shape.architectures or [""])[0]
        first = next(auto for ending, auto in autos.items() if named.endswith(ending))
        said = ""
        for auto in dict.fromkeys((first, transformers.AutoModel, *autos.values())):
            try:
                with torch.device("meta"):
                    model = auto.from_config(copy.deepcopy(shape), trust_remote_code=self.trust)
                    rows = self._embedding_rows(model)
                    if rows is not None:
                        model.resize_token_embeddings(rows, mean_resizing=False)
                    adapted = self._wrapped(model)
            except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
                said = said or str(error)
                continue
            found = self.peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
            wanted = {key: list(x.shape) for key, x in found.items()}
            names = sorted(key for key in wanted.keys() | self.shapes.keys() if not _embedding(key))
            wrong = next((key for key in names if wanted.get(key) != self.shapes.get(key)), None)
            if wrong is None:
                return auto
            shapes = [tree.get(wrong, "absent") for tree in (self.shapes, wanted)]
            said = said or f"{wrong} is {shapes[0]}, its settings and base want {shapes[1]}"
        raise InputError(self.adapter.place, f"does not fit its base {self.adapter.base}: {said[:200]}")

    def _wrapped(self, model: Any) -> Any:
        settings = copy.deepcopy(self.settings)
        kind = self.peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(settings.task_type, self.peft.PeftModel)
        return kind(model, settings)

    def _adapted(self, model: Any) -> Any:
        kind = self.peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(self.settings.task_type, self.peft.PeftModel)
        return kind.from_pretrained(model, str(self.adapter.place), config=copy.deepcopy(self.settings))

    def _trained(self, model: Any) -> set[str]:
        """The base's weights that the adapter brings whole, by the base's names."""
        keys = {key.removeprefix("base_model.model.") for key in self.shapes}
        return keys & set(model.state_dict())

    def _embedding_rows(self, model: Any) -> int | None:
        """Words of the embeddings that the adapter brings, where these are more or fewer than the base's."""
        rows = next((shape[0] for key, shape in self.shapes.items() if _embedding(key)), None)
        return None if rows in (None, model.get_input_embeddings().num_embeddings) else rows


def _embedding(key: str) -> bool:
    plain = _WRAPPED.sub(".", key)  # beside an update of them, too, peft saves them whole
    return plain.endswith(("embed_tokens.weight", "word_embeddings.weight", "lm_head.weight"))


def require_peft(where: str) -> Any:
    """The package peft. Raises InputError, of `where`, with how to install it."""
    try:
        import peft
    except ImportError:
        what = "needs the package peft, which is not installed"
        raise InputError(where, what, 'pip install "lead-ds[adapters]"') from None
    return peft


@contextmanager
def _without_adapter(base: str, subfolder: str) -> Iterator[str]:
    """A folder to load a base from that has no adapter beside it: transformers would load that, too."""
    folder = Path(base)
    if not (folder / subfolder / SETTINGS).is_file():
        yield base
        return
    with tempfile.TemporaryDirectory() as made:
        (Path(made) / subfolder).mkdir(parents=True, exist_ok=True)
        for file in (folder / subfolder).iterdir():
            if file.is_file() and not file.name.startswith("adapter_"):
                os.symlink(file.absolute(), Path(made) / subfolder / file.name)
        yield made


@contextmanager
def _unsharded() -> Iterator[None]:
    """While open, an HfDeepSpeedConfig shards nothing: one process merges a whole model."""
    from transformers.integrations import deepspeed

    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


@contextmanager
def _one_line_errors(path: str) -> Iterator[None]:
    """Turn what peft and transformers raise for an adapter or its base into one line."""
    try:
        yield
    except (LeadError, MemoryError, OSError):
        raise
    except Exception as error:  # a foreign file can be wrong in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "its base comes with Python code of its own: set trust_remote_code: true if you have read it"
        raise InputError(path, f"peft cannot merge this adapter: {reason[:200]}") from error


def _write(model: Any, folder: Path) -> None:
    """Put a model's weights and configuration into its copy, the weights whole or not at all."""
    # Whichever process came first writes; transformers would let rank 0 alone.
    model.should_save_on_this_rank = lambda *_, **__: True
    with tempfile.TemporaryDirectory(dir=folder) as made:
        model.save_pretrained(made, max_shard_size="5GB")
        files = sorted(Path(made).iterdir(), key=lambda file: file.name == "config.json")
        if not any(file.suffix == ".safetensors" for file in files):
            raise OSError("transformers wrote no weights")
        for file in files:
            if file.suffix == ".safetensors" or file.name.endswith(".index.json") or file.name == "config.json":
                os.replace(file, folder / file.name)
