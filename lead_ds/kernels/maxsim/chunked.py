"""MaxSim in torch without the similarity tensor: one matrix product per chunk of passages, what a CPU runs.

Dimensions: Q queries, P passages, l query tokens (Lq), m passage tokens (Ld), D width, R = Q * Lq query rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lead_ds.kernels.dispatch import accumulation_dtype

# Similarities held at once. 4 MiB of float32 stays in a CPU's cache between the product and the maximum over it.
_CHUNK_SCORES = 1 << 20
# Elements of the weighted query rows that the backward pass scatters at once.
_SCATTER_ELEMENTS = 1 << 21


def argmax_dtype(passage_length: int) -> torch.dtype:
    """int16 wherever a token's position fits, which halves what is kept for the backward pass."""
    return torch.int16 if passage_length <= torch.iinfo(torch.int16).max else torch.int32


def forward(
    q_QlD: Tensor, d_PmD: Tensor, q_mask: Tensor | None, d_mask: Tensor | None, save_argmax: bool
) -> tuple[Tensor, Tensor]:
    """Scores [Q, P] and, if requested, every query row's winning token [P, Q * Lq] (-1 = none); else an empty
    tensor."""
    queries, length_q, width = q_QlD.shape
    passages, length_d, _ = d_PmD.shape
    dtype = accumulation_dtype(q_QlD.dtype)
    scores_QP = torch.zeros(queries, passages, dtype=dtype, device=q_QlD.device)
    rows = queries * length_q
    shape = (passages, rows) if save_argmax else (0,)
    argmax_PR = torch.full(shape, -1, dtype=argmax_dtype(length_d), device=q_QlD.device)
    if rows * passages * length_d == 0:
        return scores_QP, argmax_PR
    chunk_p = min(passages, max(1, _CHUNK_SCORES // (rows * length_d)))
    chunk_q = min(queries, max(1, _CHUNK_SCORES // (length_q * length_d * chunk_p)))
    for q0 in range(0, queries, chunk_q):
        q_RD = q_QlD[q0 : q0 + chunk_q].reshape(-1, width).to(dtype)
        here = slice(q0 * length_q, q0 * length_q + q_RD.shape[0])
        hidden_R = None if q_mask is None else ~q_mask[q0 : q0 + chunk_q].reshape(-1, 1)
        for p0 in range(0, passages, chunk_p):
            d_mD = d_PmD[p0 : p0 + chunk_p].reshape(-1, width).to(dtype)
            similarity_RPm = torch.mm(q_RD, d_mD.T).view(q_RD.shape[0], -1, length_d)
            if d_mask is not None:
                similarity_RPm.masked_fill_(~d_mask[p0 : p0 + chunk_p], float("-inf"))
            if save_argmax:
                best_RP, winner_RP = similarity_RPm.max(dim=-1)
            else:
                best_RP = similarity_RPm.amax(dim=-1)
            skipped_RP = None if d_mask is None else best_RP == float("-inf")
            if hidden_R is not None:
                skipped_RP = hidden_R if skipped_RP is None else skipped_RP | hidden_R
            if skipped_RP is not None:
                best_RP = best_RP.masked_fill(skipped_RP, 0)
            if save_argmax:
                if skipped_RP is not None:
                    winner_RP = winner_RP.masked_fill(skipped_RP, -1)
                argmax_PR[p0 : p0 + chunk_p, here] = winner_RP.T
            scores_QP[q0 : q0 + chunk_q, p0 : p0 + chunk_p] = best_RP.view(-1, length_q, best_RP.shape[1]).sum(dim=1)
    return scores_QP, argmax_PR


def backward(
    grad_QP: Tensor, q_QlD: Tensor, d_PmD: Tensor, q_mask: Tensor | None, d_mask: Tensor | None, argmax_PR: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of q and d: a weighted gather of the winning passage tokens; a scatter of the query rows onto them."""
    queries, length_q, width = q_QlD.shape
    passages, length_d, _ = d_PmD.shape
    dtype = accumulation_dtype(q_QlD.dtype)
    rows = queries * length_q
    dq_RD = torch.zeros(rows, width, dtype=dtype, device=q_QlD.device)
    dd_PmD = torch.zeros_like(d_PmD, memory_format=torch.contiguous_format)
    if rows * passages * length_d == 0:
        return dq_RD.view(q_QlD.shape).to(q_QlD.dtype), dd_PmD
    q_RD = q_QlD.reshape(rows, width).to(dtype)
    if q_mask is not None:
        # A weight of 0 does not silence a NaN in the padding.
        q_RD = q_RD.masked_fill(~q_mask.reshape(rows, 1), 0)
    grad_PQ = grad_QP.T.to(dtype)
    chunk_p = min(passages, max(1, _SCATTER_ELEMENTS // (rows * width)))
    for p0 in range(0, passages, chunk_p):
        winner_PR = argmax_PR[p0 : p0 + chunk_p].long()
        count = winner_PR.shape[0]
        weight_PR = grad_PQ[p0 : p0 + chunk_p].repeat_interleave(length_q, dim=1).masked_fill_(winner_PR < 0, 0)
        first_P1 = torch.arange(0, count * length_d, length_d, device=q_QlD.device)[:, None]
        token_PR = winner_PR.clamp_(min=0).add_(first_P1)
        d_mD = d_PmD[p0 : p0 + chunk_p].reshape(-1, width).to(dtype)
        if d_mask is not None:
            d_mD = d_mD.masked_fill(~d_mask[p0 : p0 + chunk_p].reshape(-1, 1), 0)
        dq_RD += F.embedding_bag(token_PR.T.contiguous(), d_mD, per_sample_weights=weight_PR.T.contiguous(), mode="sum")
        dd_mD = torch.zeros_like(d_mD)
        dd_mD.index_add_(0, token_PR.reshape(-1), (q_RD * weight_PR[:, :, None]).view(-1, width))
        dd_PmD[p0 : p0 + chunk_p] = dd_mD.view(count, length_d, width)
    return dq_RD.view(q_QlD.shape).to(q_QlD.dtype), dd_PmD
