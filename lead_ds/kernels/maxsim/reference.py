"""MaxSim in plain torch with the full similarity tensor: what every other implementation is tested against."""

import torch
from torch import Tensor


def maxsim_reference(
    q: Tensor, d: Tensor, q_mask: Tensor | None = None, d_mask: Tensor | None = None, *, cosine: bool = False
) -> Tensor:
    """Sum over query tokens of the largest product with a passage token; differentiable, in the dtype of `q`.

    q [Q, Lq, D], d [P, Ld, D], masks [Q, Lq] and [P, Ld] with 1 = real -> scores [Q, P]. Masked tokens are zeroed
    first, so that whatever lies in the padding (even NaN) stays out of the gradients too. ColBERT,
    https://arxiv.org/abs/2004.12832, eq. 3.
    """
    if q_mask is not None:
        q = q.masked_fill(~q_mask.bool()[..., None], 0)
    if d_mask is not None:
        d = d.masked_fill(~d_mask.bool()[..., None], 0)
    if cosine:
        q, d = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(d, dim=-1)
    if d.shape[1] == 0:
        return q.new_zeros(q.shape[0], d.shape[0])
    similarity = torch.einsum("qld,pmd->qplm", q, d)
    if d_mask is not None:
        similarity = similarity.masked_fill(~d_mask.bool()[None, :, None, :], float("-inf"))
    best = similarity.max(dim=-1).values
    best = best.masked_fill(best == float("-inf"), 0)
    if q_mask is not None:
        best = best.masked_fill(~q_mask.bool()[:, None, :], 0)
    return best.sum(dim=-1)
