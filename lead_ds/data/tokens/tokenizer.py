"""A model's tokenizer: loaded with errors that say what to do, and changed where a family reads text in its own way."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from lead_ds.errors import InputError
from lead_ds.io.hub import hub_settings
from lead_ds.io.located import located

_TOKENIZER_FILE = re.compile(r".*token.*\.(json|model)$|vocab|.*\.model$|tekken")


def load_tokenizer(path: str, subfolder: str = "", trust_remote_code: bool = False) -> Any:
    """The tokenizer of a local directory or hub repository, with a pad token. Raises InputError when there is none."""
    from transformers import AutoTokenizer

    folder = Path(located(path)).expanduser()
    if not folder.is_dir() and (folder.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1):
        raise InputError(path, "no such folder", "path is a model's directory, or its name on the Hugging Face hub")
    if folder.is_dir() and not any(file.is_file() and _TOKENIZER_FILE.match(file.name) for file in folder.glob("**/*")):
        raise InputError(path, "holds no tokenizer files", "copy the model's tokenizer.json and tokenizer_config.json")
    where = str(folder) if folder.is_dir() else path
    if subfolder and folder.is_dir() and not list((folder / subfolder).glob("*token*")):
        subfolder = ""  # older sentence-transformers directories keep the tokenizer at the top
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            where, subfolder=subfolder, trust_remote_code=trust_remote_code, **hub_settings(path)
        )
    except Exception as error:  # a foreign file can be wrong in any way
        reason = str(error).strip().splitlines() or [type(error).__name__]
        what = f"its tokenizer cannot be loaded: {reason[0][:160]}"
        remedy = "check the path, that it holds tokenizer files, and access to the hub"
        if not folder.is_dir():
            what = f"there is no such folder, and it cannot be read from the hub: {reason[0][:160]}"
        raise InputError(path, what, remedy) from None
    if tokenizer is None or not len(tokenizer):
        raise InputError(path, "its tokenizer is empty", "add the model's tokenizer files")
    if tokenizer.pad_token_id is None:
        spare = tokenizer.eos_token or tokenizer.unk_token
        if spare is None:
            raise InputError(
                path, "its tokenizer has neither a pad nor an eos token", "set one in tokenizer_config.json"
            )
        tokenizer.pad_token = spare
    return tokenizer


def blank_tokenizer() -> Any:
    """A tokenizer of two tokens, where a model is wanted and its text is read elsewhere."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[MASK]": 1}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", mask_token="[MASK]")


def tokenizer_checksum(tokenizer: Any) -> str:
    """A hash of what a tokenizer does: of all its state, or of a slow one's vocabulary."""
    state = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(sorted(tokenizer.get_vocab()))
    return hashlib.blake2b(state.encode(), digest_size=16).hexdigest()


def end_with_eos(tokenizer: Any) -> None:
    """Change a fast tokenizer that adds no special token after a text to add its EOS, pairs included; no other is changed."""
    ids = tokenizer("a")["input_ids"]
    special = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    if tokenizer.eos_token_id is None or not tokenizer.is_fast or (ids and ids[-1] in special):
        return
    from tokenizers import processors

    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.post_processor.__getstate__()) if backend.post_processor is not None else None
    steps = state["processors"] if state and state["type"] == "Sequence" else [state] if state else []
    template = next((step for step in steps if step["type"] == "TemplateProcessing"), None)
    if template is None:
        text = {name: {"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")}
        template = {"single": [text["A"]], "pair": [text["A"], text["B"]], "special_tokens": {}}
        template["type"] = "TemplateProcessing"
        steps.append(template)
    eos = tokenizer.eos_token
    for name, type_id in (("single", 0), ("pair", 1)):
        template[name].append({"SpecialToken": {"id": eos, "type_id": type_id}})
    template["special_tokens"][eos] = {"id": eos, "ids": [tokenizer.eos_token_id], "tokens": [eos]}
    processor = processors.Sequence([])
    processor.__setstate__(json.dumps({"type": "Sequence", "processors": steps}).encode())
    backend.post_processor = processor


def leading_tokens(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts before a text (BOS). What it may put after one would hide the end of a prompt."""
    plain, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    return tuple(whole[: whole.index(plain[0])]) if plain else ()


def trailing_tokens(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts after a text (EOS)."""
    plain, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    return tuple(whole[whole.index(plain[-1]) + 1 :]) if plain else ()


def keep_markers_whole(tokenizer: Any, prompts: list[str]) -> None:
    """A prompt that is one entry of the vocabulary, such as ColBERT's [unused0], becomes one token and not its pieces."""
    vocabulary = tokenizer.get_vocab()
    for marker in {prompt.strip() for prompt in prompts} - {""}:
        if marker in vocabulary and len(tokenizer.tokenize(marker)) > 1:
            tokenizer.add_tokens([marker], special_tokens=True)
