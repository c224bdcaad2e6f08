"""A language model that answers yes or no: relevance is how far its logit of yes is ahead, read from every selected layer.

Dimensions: K selected layers, B prompts, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.data.tokens.tokenizer import load_tokenizer
from lead_ds.errors import InputError
from lead_ds.models.backbone import load_model
from lead_ds.models.files import transformer_folder
from lead_ds.models.kinds.kind import KINDS, Use
from lead_ds.models.kinds.pairs import PairScorer, pooled, pooling
from lead_ds.models.text import Reading
from lead_ds.settings.model import PairConfig

if TYPE_CHECKING:
    from lead_ds.data.tokens.encoder import Tokens


class LLMRerankerConfig(PairConfig):
    """A decoder reranker: its prompt, and the two answers whose logits are compared."""

    kind: Literal["llm_reranker"] = "llm_reranker"
    instruction: str = Field(
        "Given a web search query, retrieve relevant passages that answer the query",
        description="the task, stated in the prompt",
    )
    template: str = Field(
        "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {passage}\nRelevant (yes or no):",
        description="the prompt, with {instruction}, {query} and {passage}",
    )
    yes_token: str = " yes"
    no_token: str = " no"

    @field_validator("template")
    @classmethod
    def _template(cls, value: str) -> str:
        missing = [name for name in ("{query}", "{passage}") if name not in value]
        if missing:
            raise ValueError(f"template lacks {' and '.join(missing)}")
        return value


@KINDS.register("llm_reranker")
class LLMReranker(PairScorer):
    """logit(yes) - logit(no) at the prompt's last token.

    Two rows of the language-model head are copied once (gathered, where ZeRO-3 shards it) and the head is dropped: a
    vocabulary of logits per prompt is never computed. The rows are multiplied in float32, for in half precision the
    difference of two large logits is coarse.
    """

    name = "llm_reranker"
    Settings = LLMRerankerConfig
    head = "causal"
    use = Use("decoder reranker", "transformers", "text-ranking", ("reranker",), "")
    can_be_student = False
    can_be_trained = False
    rows_2D: Tensor
    bias_2: Tensor

    def __init__(self, chain: Any, causal: Any, config: LLMRerankerConfig, *, student: bool = False) -> None:
        folder = transformer_folder(config.path)
        yes, no = answer_tokens(load_tokenizer(config.path, folder, config.trust_remote_code), config)
        rows_2D, bias_2 = _head_rows(causal, yes, no, config.path)
        super().__init__(chain, causal.base_model, config, student=student)
        self._pool = pooling(self.width, "lasttoken")
        # Buffers, not parameters: two rows are not worth sharding.
        self.register_buffer("rows_2D", rows_2D)
        self.register_buffer("bias_2", bias_2)
        shape = causal.config.get_text_config()
        self.softcap: float | None = getattr(shape, "final_logit_softcapping", None)
        self.logit_scale = float(getattr(shape, "logit_scale", None) or 1.0)  # Cohere
        self.logit_scale /= float(getattr(shape, "logits_scaling", None) or 1.0)  # Granite

    @classmethod
    def read_text(cls, config: Any) -> TextEncoder:
        reading = Reading.of(config, cls.family)
        if not reading.tokenizer.is_fast:
            raise InputError(config.path, "its tokenizer gives no offsets", "use a model with a tokenizer.json")
        prompt = {"template": config.template, "instruction": config.instruction}
        return reading.encoder({"max_length": config.max_length}, reads_pairs=True, **prompt)

    @classmethod
    def skeleton(cls, config: Any, *, depth: int | None = None, **_: Any) -> tuple[nn.Module, Any, int]:
        """The backbone alone: which rows of the head are kept is known to the tokenizer only, and they weigh nothing."""
        with torch.device("meta"):
            random = config.model_copy(update={"weights": "random"})
            backbone = load_model(random, "base", torch.bfloat16, depth)
        return backbone, backbone, int(backbone.config.get_text_config().hidden_size)

    def _scores(self, tokens: Tokens, layers: Sequence[int]) -> Tensor:
        mask_BL = tokens["attention_mask"]
        read = self.run(tokens, layers, lambda state: pooled(self._pool, state, mask_BL), through_norm=False)
        logits_KB2 = torch.stack(read).float() @ self.rows_2D.float().T + self.bias_2.float()
        logits_KB2 = logits_KB2 * self.logit_scale
        if self.softcap is not None:
            logits_KB2 = self.softcap * torch.tanh(logits_KB2 / self.softcap)
        scores_KB = logits_KB2[..., 0] - logits_KB2[..., 1]
        return scores_KB if self.lens is None else self.lens(scores_KB, read, layers)


def answer_tokens(tokenizer: Any, config: LLMRerankerConfig) -> tuple[int, int]:
    """The ids of yes_token and no_token. Raises InputError where one of them is not one token of the model."""
    found = []
    for key, text in (("yes_token", config.yes_token), ("no_token", config.no_token)):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            pieces = " ".join(tokenizer.convert_ids_to_tokens(ids))
            raise InputError(
                f"teacher.{key}", f"{text!r} is {len(ids)} tokens of this model: {pieces}", "choose another"
            )
        found.append(int(ids[0]))
    if found[0] == found[1]:
        raise InputError("teacher.yes_token", f"yes and no are the same token of this model: {config.yes_token!r}")
    return found[0], found[1]


def _head_rows(causal: Any, yes: int, no: int, path: str) -> tuple[Tensor, Tensor]:
    head = causal.get_output_embeddings()
    if head is None:
        raise InputError(path, "has no language-model head to read yes and no from")
    parameters = [p for p in (head.weight, getattr(head, "bias", None)) if p is not None]
    if any(hasattr(p, "ds_id") for p in parameters):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            return _copied(parameters, yes, no)
    return _copied(parameters, yes, no)


def _copied(parameters: list[Tensor], yes: int, no: int) -> tuple[Tensor, Tensor]:
    rows = parameters[0].detach()[[yes, no]].clone()
    bias = parameters[1].detach()[[yes, no]].clone() if len(parameters) > 1 else rows.new_zeros(2)
    return rows, bias
