"""Relevance of queries to passages that were each read once: states are kept, and pairs of them compared.

Dimensions: K layers and the final state, Q queries, B passages of a batch, C pairs, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lead_ds.data.tokens.encoder import Tokens, score_mask
from lead_ds.relevance import Scale, TokenFeatures, VectorFeatures, pad_tokens

States = tuple[Tensor, Tensor | None]
"""Vectors [K, texts, D] and None; or token states [K, texts, L, D] and which tokens count [texts, L]."""


def states_of(tokens: Tokens, states: Tensor) -> States:
    """Of a batch of texts."""
    return states, score_mask(tokens) if states.ndim == 4 else None


def joined(batches: Iterable[tuple[list[int], Tokens, Tensor]]) -> States:
    """Of all batches, (places, tokens, states), in order of their places."""
    order: list[int] = []
    found: list[States] = []
    for places, tokens, states in batches:
        order += places
        found.append(states_of(tokens, states))
    if not found:
        return torch.empty(0), None
    parts, masks = [states for states, _ in found], [mask for _, mask in found if mask is not None]
    back = torch.from_numpy(np.argsort(order)).to(parts[0].device)
    if not masks:
        return torch.cat(parts, 1)[:, back], None
    longest = max(mask.shape[1] for mask in masks)
    mask_QL = torch.cat([pad_tokens(mask, 1, longest) for mask in masks])[back]
    return torch.cat([pad_tokens(part, 2, longest) for part in parts], 1)[:, back], mask_QL


def compared(
    queries: States, passages: States, query_of: np.ndarray, passage_of: np.ndarray, scale: Scale, at_once: int
) -> Iterator[tuple[slice, Tensor]]:
    """Relevance [C', K] of some of the pairs at a time, at most `at_once`: which they are, and what it is.

    query_of, passage_of [C]: the query, and the passage of a batch, of each pair.
    """
    (q_states, q_mask), (p_states, p_mask) = queries, passages
    for first in range(0, len(query_of), at_once):
        some = slice(first, first + at_once)
        q, p = (torch.from_numpy(rows[some]).to(p_states.device) for rows in (query_of, passage_of))
        features: VectorFeatures | TokenFeatures
        if q_mask is None or p_mask is None:
            features = VectorFeatures(q_states[:, q], p_states[:, p], scale)
        else:
            features = TokenFeatures(q_states[:, q], q_mask[q], p_states[:, p], p_mask[p], scale)
        yield some, features.group_relevance(1).logits[..., 0].T


def pairs_of(places: Sequence[int], by_passage: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pairs whose passages stand at `places`, and the place in the batch of each one's passage.

    by_passage: pairs, sorted by passage, of which those of passage i lie from bounds[i] to bounds[i + 1].
    """
    found = [by_passage[bounds[place] : bounds[place + 1]] for place in places]
    return np.concatenate(found), np.repeat(np.arange(len(places)), [len(pairs) for pairs in found])
