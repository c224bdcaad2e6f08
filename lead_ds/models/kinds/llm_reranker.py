"""A language model that answers yes or no: relevance is how far its logit of yes is ahead, read from every selected layer.

Dimensions: K selected layers, A answers (yes, or yes and no), B prompts, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lead_ds.data.tokens.encoder import TextEncoder, Tokens
from lead_ds.data.tokens.pair_templates import Filled
from lead_ds.errors import InputError
from lead_ds.models.backbone import load_model, read_model_config
from lead_ds.models.chain import open_chain
from lead_ds.models.files import family_of, logit_score, read_json, transformer_folder
from lead_ds.models.kinds.kind import KINDS, Use
from lead_ds.models.kinds.pairs import PairScorer, pooled, pooling
from lead_ds.models.templates import CARDS, Asked, asked, known_as
from lead_ds.models.text import Reading
from lead_ds.settings.model import PairConfig


class LLMRerankerConfig(PairConfig):
    """A decoder reranker: its prompt, and the two answers whose logits are compared."""

    kind: Literal["llm_reranker"] = "llm_reranker"
    yes_token: str = Field("auto", description="the answer of relevance; auto: as its files or its template have it")
    no_token: str | None = Field(
        "auto",
        description="the answer against; null: the logit of yes alone; auto: as its files or its template have it",
    )


@KINDS.register("llm_reranker")
class LLMReranker(PairScorer):
    """logit(yes) - logit(no), or logit(yes) alone, at the prompt's last token.

    One or two rows of the language-model head are copied once (gathered, where ZeRO-3 shards it) and the head is dropped: a
    vocabulary of logits per prompt is never computed. The rows are multiplied in float32, for in half precision the
    difference of two large logits is coarse.
    """

    name = "llm_reranker"
    Settings = LLMRerankerConfig
    head = "causal"
    use = Use("decoder reranker", "transformers", "text-ranking", ("reranker",), "")
    can_be_student = False
    can_be_trained = False
    rows_AD: Tensor
    bias_A: Tensor

    def __init__(self, chain: Any, causal: Any, config: LLMRerankerConfig, *, student: bool = False) -> None:
        reading = Reading.of(config, self.family)
        how = _asked(config, reading)
        answers = answer_tokens(reading.tokenizer, config, how)
        rows_AD, bias_A = _head_rows(causal, answers, config.path)
        super().__init__(chain, causal.base_model, config, student=student)
        self.answers = answers
        self._pool = pooling(self.width, "lasttoken")
        # Buffers, not parameters: two rows are not worth sharding.
        self.register_buffer("rows_AD", rows_AD)
        self.register_buffer("bias_A", bias_A)
        shape = causal.config.get_text_config()
        self.softcap: float | None = getattr(shape, "final_logit_softcapping", None)
        self.logit_scale = float(getattr(shape, "logit_scale", None) or 1.0)  # Cohere
        self.logit_scale /= float(getattr(shape, "logits_scaling", None) or 1.0)  # Granite
        self.divisor = how.card.divisor if how.card is not None else 1.0

    @classmethod
    def claims(cls, path: str) -> int:
        if logit_score(path) is not None:
            return 3
        names = read_json(path, "config.json").get("architectures") or ()
        generates = any(str(name).endswith("ForConditionalGeneration") for name in names)
        return 3 if generates and family_of(path) is None and known_as(path, ("monot5", "monomt5")) else 0

    @classmethod
    def load(cls, config: Any, dtype: torch.dtype, **how: Any) -> Any:
        """See `Kind`: of an encoder-decoder one that is read where it begins to answer."""
        if not getattr(read_model_config(config), "is_encoder_decoder", False):
            return super().load(config, dtype, **how)
        return Seq2SeqReranker.opened(config, dtype)

    @classmethod
    def read_text(cls, config: Any) -> TextEncoder:
        reading = Reading.of(config, cls.family)
        how = _asked(config, reading)
        if isinstance(how.template, Filled) and not reading.tokenizer.is_fast:
            raise InputError(config.path, "its tokenizer gives no offsets", "use a model with a tokenizer.json")
        return cls.pair_encoder(config, reading, how)

    @classmethod
    def complete(cls, chain: Any, model: Any, config: Any, *, frozen: bool) -> None:
        _check_head(config.path)

    @classmethod
    def skeleton(cls, config: Any, *, depth: int | None = None, **_: Any) -> tuple[nn.Module, Any, int]:
        """The backbone alone: which rows of the head are kept is known to the tokenizer only, and they weigh nothing."""
        with torch.device("meta"):
            random = config.model_copy(update={"weights": "random"})
            whole = bool(getattr(read_model_config(random), "is_encoder_decoder", False))
            backbone = load_model(random, "seq2seq" if whole else "base", torch.bfloat16, None if whole else depth)
        return backbone, backbone, int(backbone.config.get_text_config().hidden_size)

    @classmethod
    def logits_of(cls, model: Any, tokens: Tokens) -> Tensor:
        last_B = tokens["attention_mask"].sum(1) - 1
        return model(**tokens, use_cache=False).logits[torch.arange(len(last_B)), last_B]

    def scores_of(self, logits: Tensor) -> Tensor:
        yes, *no = self.answers
        return (logits[:, yes] - (logits[:, no[0]] if no else 0.0)) / self.divisor

    def _read(self, tokens: Tokens, layers: Sequence[int]) -> Tensor:
        read = self.run(tokens, layers, lambda state: self._answering(state, tokens), through_norm=False)
        logits_KBA = torch.stack(read).float() @ self.rows_AD.float().T + self.bias_A.float()
        logits_KBA = logits_KBA * self.logit_scale
        if self.softcap is not None:
            logits_KBA = self.softcap * torch.tanh(logits_KBA / self.softcap)
        scores_KB = logits_KBA[..., 0] - logits_KBA[..., 1] if logits_KBA.shape[-1] > 1 else logits_KBA[..., 0]
        scores_KB = scores_KB / self.divisor
        return scores_KB if self.lens is None else self.lens(scores_KB, read, layers)

    def _answering(self, states_BLD: Tensor, tokens: Tokens) -> Tensor:
        """[B, D]: the state that says the answer."""
        return pooled(self._pool, states_BLD, tokens["attention_mask"])


class Seq2SeqReranker(LLMReranker):
    """An encoder-decoder (monoT5): the encoder reads the prompt, the decoder, whose layers are read, its start token alone."""

    def __init__(self, chain: Any, model: Any, config: Any, *, student: bool = False) -> None:
        super().__init__(chain, model, config, student=student)
        shape = model.config
        # T5 scales what its decoder gives where input and output share their embeddings; its successors do not.
        shared = shape.tie_word_embeddings and shape.model_type != "mt5"
        if getattr(shape, "scale_decoder_outputs", shared):
            self.logit_scale *= self.width**-0.5
        model.lm_head = nn.Identity()  # the rows of it that are read are kept

    @classmethod
    def opened(cls, config: Any, dtype: torch.dtype) -> Any:
        """A scorer in evaluation mode, of all its layers. Errors as `Kind.load`."""
        chain = open_chain(config, cls.family, "seq2seq")
        model = load_model(config, "seq2seq", dtype)
        cls.complete(chain, model, config, frozen=True)
        return cls.of_parts(chain, model, config, student=False).eval()

    @classmethod
    def logits_of(cls, model: Any, tokens: Tokens) -> Tensor:
        start_B1 = torch.full_like(tokens["input_ids"][:, :1], model.config.decoder_start_token_id)
        return model(**tokens, decoder_input_ids=start_B1).logits[:, 0]

    @property
    def backbone(self) -> Any:
        """The decoder, whose layers are read."""
        return self.model.decoder

    def _inputs(self, tokens: Tokens) -> dict[str, Any]:
        """Of the decoder: its start token, and what the encoder makes of the prompts."""
        ids_BL, mask_BL = tokens["input_ids"], tokens["attention_mask"]
        read_BLD = self.model.encoder(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        start_B1 = ids_BL.new_full((len(ids_BL), 1), self.model.config.decoder_start_token_id)
        more = {"encoder_hidden_states": read_BLD, "encoder_attention_mask": mask_BL}
        return {"input_ids": start_B1, "use_cache": False, **more}

    def _answering(self, states_BLD: Tensor, tokens: Tokens) -> Tensor:
        return states_BLD[:, 0]


def _asked(config: LLMRerankerConfig, reading: Reading) -> Asked:
    """How pairs are put to it. Raises InputError where nothing says: no prompt is guessed for a language model."""
    whole = bool(getattr(reading.shape, "is_encoder_decoder", False))
    how = asked(config, reading, LLMReranker.family, "seq2seq" if whole else "causal")
    if how is None and config.yes_token == "auto":
        what = "no file of it says how a decoder reranker is asked"
        remedy = f"set template: one of {', '.join(CARDS)}, or the prompt itself"
        raise InputError(config.path, what, remedy)
    card = CARDS["monot5" if whole else "plain"]
    return how or Asked(card.template(reading, config.instruction), card)


def answer_tokens(tokenizer: Any, config: LLMRerankerConfig, how: Asked) -> list[int]:
    """The ids of yes and, unless that alone is read, of no: the configuration's, else the files', else the card's.

    Raises InputError where one of them is not one token of the model, and where they are the same.
    """
    saved = logit_score(config.path) or {}
    by_files = how.card is None and bool(saved)
    card = how.card or CARDS["pair"]
    found: list[int] = []
    for key, given, usual, own in (
        ("yes_token", config.yes_token, card.yes, saved.get("true_token_id")),
        ("no_token", config.no_token, card.no, saved.get("false_token_id")),
    ):
        if given == "auto" and by_files:
            found += [own] if own is not None else []
        elif (text := usual if given == "auto" else given) is not None:
            found.append(_one_token(tokenizer, f"teacher.{key}", text, whole=card.whole or given != "auto"))
    if len(set(found)) < len(found):
        raise InputError("teacher.yes_token", f"yes and no are the same token of this model: {config.yes_token!r}")
    if not found or not all(isinstance(i, int) and 0 <= i < len(tokenizer) for i in found):
        raise InputError(config.path, f"names no token of its own as an answer: {found}", "set yes_token and no_token")
    return found


def _one_token(tokenizer: Any, key: str, text: str, *, whole: bool) -> int:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 and (whole or not ids):
        pieces = " ".join(tokenizer.convert_ids_to_tokens(ids))
        raise InputError(key, f"{text!r} is {len(ids)} tokens of this model: {pieces}", "choose another")
    return int(ids[0])


def _check_head(path: str) -> None:
    """Refuse a head of sentence-transformers that reads something else than the logits of the last token."""
    if family_of(path) != LLMReranker.family:
        return
    score = logit_score(path)
    if score is None:
        raise InputError(path, "it scores pairs by another head than a language model's", "use kind: cross_encoder")
    folder = transformer_folder(path)
    task = read_json(path, f"{folder}/sentence_bert_config.json".lstrip("/")).get("transformer_task")
    if task != "text-generation" or score.get("module_input_name", "causal_logits") != "causal_logits":
        raise InputError(path, f"scores by {score} of the task {task}", "only text-generation is read here")


def _head_rows(causal: Any, answers: list[int], path: str) -> tuple[Tensor, Tensor]:
    head = causal.get_output_embeddings()
    if head is None:
        raise InputError(path, "has no language-model head to read answers from")
    parameters = [p for p in (head.weight, getattr(head, "bias", None)) if p is not None]
    if any(hasattr(p, "ds_id") for p in parameters):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            return _copied(parameters, answers)
    return _copied(parameters, answers)


def _copied(parameters: list[Tensor], answers: list[int]) -> tuple[Tensor, Tensor]:
    rows_AD = parameters[0].detach()[answers].clone()
    bias_A = parameters[1].detach()[answers].clone() if len(parameters) > 1 else rows_AD.new_zeros(len(answers))
    return rows_AD, bias_A
