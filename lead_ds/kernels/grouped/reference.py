"""The grouped attention KL in plain torch, by loops: what every other implementation is measured against."""

import torch
from torch import Tensor

from lead_ds.kernels.attention_kl.inputs import Maps
from lead_ds.kernels.attention_kl.reference import attention_log_probs, kl_of_log_probs, scaled


def grouped_attention_kl_reference(
    teacher: Maps,
    student: Maps,
    t_groups: Tensor,
    s_groups: Tensor,
    *,
    temperature: float = 1.0,
    relation_heads: int | None = None,
) -> Tensor:
    """`grouped_attention_kl` of one layer pair, a scalar, by loops over texts, heads and groups.

    t_groups [B, Lt], s_groups [B, Ls], -1 = in no group.
    """
    models = [(scaled(maps, relation_heads, temperature), x) for maps, x in ((teacher, t_groups), (student, s_groups))]
    total, rows = models[1][0][0].new_zeros(()), 0
    for b in range(len(t_groups)):
        common = sorted((set(t_groups[b].tolist()) & set(s_groups[b].tolist())) - {-1})
        if not common:
            continue
        maps = []
        for (q, k, scale), groups in models:
            member = torch.stack([groups[b] == g for g in common])
            log_probs = attention_log_probs(q[b : b + 1], k[b : b + 1], scale, member.any(0))[0]
            keys = torch.stack([log_probs[..., m].logsumexp(-1) for m in member], dim=-1)
            maps.append(torch.stack([keys[:, m].exp().mean(1) for m in member], dim=1).log())
        total = total + kl_of_log_probs(*maps).mean(0).sum()
        rows += len(common)
    return total / max(rows, 1)
