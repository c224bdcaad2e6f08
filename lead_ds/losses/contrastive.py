"""L_stu (and L_tch of a co-trained teacher): the negative log-likelihood of the positive passage."""

from __future__ import annotations

import torch
from torch import Tensor

from lead_ds.relevance import Relevance


def contrastive_loss(relevance: Relevance, target_Q: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over queries of -log softmax(logits / temperature)[positive], in nats.

    relevance: one layer, [1, Q, P]; target_Q: int64 column of each query's positive. Returns a float32 scalar.
    LEAD (arXiv 2212.05225), L_stu.
    """
    return torch.nn.functional.cross_entropy(relevance.logits[0] / temperature, target_Q)
