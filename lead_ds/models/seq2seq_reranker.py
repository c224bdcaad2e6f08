"""An encoder-decoder that answers true or false (monoT5), read layer by layer of its decoder, where it begins to answer.

Dimensions: B prompts, L tokens, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lead_ds.models.backbone import load_model
from lead_ds.models.chain import open_chain
from lead_ds.models.kinds.llm_reranker import LLMReranker

if TYPE_CHECKING:
    from lead_ds.data.tokens.encoder import Tokens


class Seq2SeqReranker(LLMReranker):
    """As LLMReranker: the encoder reads the prompt, the decoder its start token alone."""

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
        """See `PairScorer`."""
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
