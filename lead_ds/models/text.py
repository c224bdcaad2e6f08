"""What a model's files say about reading text: tokenizer, prompts, positions; whatever kind it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.data.tokens.tokenizer import load_tokenizer
from lead_ds.errors import InputError
from lead_ds.io.hub import hub_settings
from lead_ds.io.located import located
from lead_ds.models.backbone import check_code
from lead_ds.models.chain import open_chain
from lead_ds.models.files import RECORD, family_of, read_json, transformer_folder
from lead_ds.models.inventory import check_keys
from lead_ds.settings.model import ModelConfig

# Absolute positions of these families start after the padding index: two fewer tokens fit than the table has rows.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "data2vec-text")


@dataclass(frozen=True)
class Reading:
    """A model's tokenizer, its transformer's configuration, and its modules where sentence-transformers saved them."""

    path: str
    tokenizer: Any
    query_prompt: str
    passage_prompt: str
    own_query_prompt: str  # its files', whatever is set
    shape: Any | None  # None: its files do not say, which loading the model reports
    chain: Any | None

    @classmethod
    def of(cls, config: ModelConfig, family: str) -> Reading:
        """Read the files of a directory or hub repository, as `family` of sentence-transformers does if it saved them.

        Prompts are the configuration's, else the model's. A tokenizer without a pad token pads with EOS. Raises InputError
        when the tokenizer cannot be loaded.
        """
        chain, folder = None, transformer_folder(config.path)
        check_code(config, folder)
        check_keys(config.path)
        own = read_json(config.path, "config_sentence_transformers.json")
        if family_of(config.path) == family:
            chain = open_chain(config, family, text=True)
            tokenizer, shape = chain[0].tokenizer, chain[0].config
            prompts = _prompts(chain)
        else:
            tokenizer = load_tokenizer(config.path, folder, bool(config.trust_remote_code))
            shape = _shape(config, folder)
            said = own.get("prompts") or {}
            prompts = {"document": said.get("passage") or "", **said}
        files_prompt = prompts.get("query") or ""
        if not any(prompts.values()):
            prompts = read_json(config.path, RECORD).get("prompts") or {
                "query": own.get("query_prefix"),
                "document": own.get("document_prefix"),
            }
        return cls(config.path, tokenizer, *_prompts_of(config, prompts), files_prompt, shape, chain)

    @classmethod
    def static(cls, config: ModelConfig, tokenizer: Any) -> Reading:
        """Of a StaticEmbedding, whose tokenizer is `tokenizer`."""
        check_keys(config.path)
        said = read_json(config.path, "config_sentence_transformers.json").get("prompts") or {}
        return cls(config.path, tokenizer, *_prompts_of(config, said), said.get("query") or "", None, None)

    @property
    def positions(self) -> int | None:
        """How many tokens the model reads at most."""
        shape = None if self.shape is None else self.shape.get_text_config()
        count = getattr(shape, "max_position_embeddings", None)
        if isinstance(count, int) and self.shape.model_type in _OFFSET_POSITIONS:  # type: ignore[union-attr]
            count -= 2
        return count if isinstance(count, int) and count > 0 else None

    @property
    def longest(self) -> int | None:
        """How many tokens sentence-transformers cuts a text to; None where neither tokenizer nor positions say."""
        says = [n for n in (self.tokenizer.model_max_length, self.positions) if n is not None and n < 1 << 30]
        return min(says) if says else None

    def length(self, name: str) -> int:
        """How many tokens of a text, or a pair, are read where no setting says: as many as the model's files do.

        A directory of ours serves one length, the longer of those that it was trained with. Raises InputError where nothing
        limits a text: it could take all memory.
        """
        record = read_json(self.path, RECORD)
        names = ("max_length",) if name == "max_length" else ("query_length", "passage_length")
        found = max((record[name] for name in names if record.get(name) is not None), default=self.longest)
        if found is None:
            raise InputError(
                self.path, "neither its tokenizer nor its positions limit a text", f"set {name}, to 512 say"
            )
        return int(found)

    def encoder(self, wanted: dict[str, int | None], **more: Any) -> TextEncoder:
        """A TextEncoder of it, with `wanted` lengths; one that is None is the model's own. Raises InputError where one exceeds
        the model's positions, and as `length`."""
        lengths: dict[str, Any] = {name: self.length(name) if n is None else n for name, n in wanted.items()}
        for name, length in lengths.items():
            if self.positions is not None and length > self.positions:
                what = f"{name} is {length}, the model has {self.positions} positions"
                raise InputError(self.path, what, f"set {name} to at most {self.positions}")
        types = "token_type_ids" in self.tokenizer.model_input_names
        typed = self.shape is None or (getattr(self.shape, "type_vocab_size", 0) or 0) > 1
        return TextEncoder(
            path=self.path,
            tokenizer=self.tokenizer,
            query_prompt=self.query_prompt,
            passage_prompt=self.passage_prompt,
            token_types=types and typed,  # whether the model distinguishes the two texts of a pair by them
            **{"longest": self.longest, **lengths, **more},
        )


def _prompts(chain: Any) -> dict[str, str]:
    """The prompts that sentence-transformers puts before a query and a document. Of a pair it is the default one, once."""
    if type(chain).__name__ == "CrossEncoder":
        return {"query": chain.prompts.get(chain.default_prompt_name) or ""}
    return chain.prompts


def _prompts_of(config: ModelConfig, saved: Mapping[str, Any]) -> tuple[str, str]:
    """What stands before queries and before passages: the configuration's, else what the files say.

    Raises InputError for one that no tokenizer could read.
    """
    query, passage = config.query_prompt, config.passage_prompt
    found = (
        query if query is not None else saved.get("query") or "",
        passage if passage is not None else saved.get("document") or "",
    )
    for name, prompt in zip(("query_prompt", "passage_prompt"), found, strict=True):
        if not isinstance(prompt, str):
            what = f"its {name} is a {type(prompt).__name__}, not a text"
            raise InputError(config.path, what, f"mend it in its files, or set {name}")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            what = f"its {name} {prompt!r} holds half a character, such as \\ud83d"
            raise InputError(config.path, what, f"write the character itself in its files, or set {name}")
    return found


def _shape(config: ModelConfig, folder: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            located(config.path),
            subfolder=folder,
            trust_remote_code=bool(config.trust_remote_code),
            **hub_settings(config.path),
        )
    except Exception:  # whatever is wrong with it, loading the model reports; the tokenizer may do without
        return None
