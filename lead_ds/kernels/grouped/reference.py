"""The grouped attention KL in plain torch, by loops: what every other implementation is measured against."""

import torch
from torch import Tensor

from lead_ds.kernels.attention_kl.inputs import relation_split
from lead_ds.kernels.attention_kl.reference import attention_log_probs, kl_of_log_probs


def grouped_attention_kl_reference(
    tq: Tensor,
    tk: Tensor,
    sq: Tensor,
    sk: Tensor,
    t_groups: Tensor,
    s_groups: Tensor,
    *,
    teacher_scale: float | None = None,
    student_scale: float | None = None,
    temperature: float = 1.0,
    relation_heads: int | None = None,
) -> Tensor:
    """`grouped_attention_kl` of one layer pair, a scalar, by loops over texts, heads and groups.

    tq [B, Ht, Lt, dt], sq [B, Hs, Ls, ds] with their keys; t_groups [B, Lt], s_groups [B, Ls], -1 = in no group.
    """
    if relation_heads is not None:
        tq, tk = (relation_split(x, tq.shape[1], relation_heads) for x in (tq, tk))
        sq, sk = (relation_split(x, sq.shape[1], relation_heads) for x in (sq, sk))
    total, rows = sq.new_zeros(()), 0
    for b in range(tq.shape[0]):
        common = sorted((set(t_groups[b].tolist()) & set(s_groups[b].tolist())) - {-1})
        if not common:
            continue
        maps = []
        for q, k, groups, scale in ((tq, tk, t_groups, teacher_scale), (sq, sk, s_groups, student_scale)):
            scale = (q.shape[3] ** -0.5 if scale is None else scale) / temperature
            member = torch.stack([groups[b] == g for g in common])
            log_probs = attention_log_probs(q[b : b + 1], k[b : b + 1], scale, member.any(0))[0]
            keys = torch.stack([log_probs[..., m].logsumexp(-1) for m in member], dim=-1)
            maps.append(torch.stack([keys[:, m].exp().mean(1) for m in member], dim=1).log())
        total = total + kl_of_log_probs(*maps).mean(0).sum()
        rows += len(common)
    return total / max(rows, 1)
