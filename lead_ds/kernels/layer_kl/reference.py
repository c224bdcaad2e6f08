"""Layer-relevance KL in plain torch with both full score maps: what every other implementation is tested against."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lead_ds.kernels.layer_kl.inputs import Factors


def layer_kl_reference(
    teacher: Factors, student: Factors, target: Tensor, *, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) and the teacher's NLL of `target`, per layer pair; differentiable, in the inputs' dtypes.

    Shapes and meaning as in `factors_kl`. LEAD, https://arxiv.org/abs/2212.05225.
    """
    t_KQP, s_KQP = _scores(teacher), _scores(student)
    hidden_QP = torch.zeros(t_KQP.shape[1:], dtype=torch.bool, device=target.device)
    if mask is not None:
        hidden_QP = ~mask.bool()
        hidden_QP[torch.arange(len(target)), target] = False
    t_KQP, s_KQP = t_KQP.masked_fill(hidden_QP, float("-inf")), s_KQP.masked_fill(hidden_QP, float("-inf"))
    log_p = torch.log_softmax(t_KQP / teacher.temperature, dim=-1).masked_fill(hidden_QP, 0)
    log_r = torch.log_softmax(s_KQP / student.temperature, dim=-1).masked_fill(hidden_QP, 0)
    kl_KQ = (log_p.exp() * (log_p - log_r)).masked_fill(hidden_QP, 0).sum(dim=-1)
    target_KQ1 = target.expand(t_KQP.shape[0], -1)[..., None]
    nll_KQ = -torch.log_softmax(t_KQP, dim=-1).gather(-1, target_KQ1).squeeze(-1)
    return kl_KQ.mean(dim=-1), nll_KQ.mean(dim=-1).detach()


def _scores(model: Factors) -> Tensor:
    q, d = (normalize(x, dim=-1) if model.cosine else x for x in model[:2])
    scores_KQP = q @ d.mT
    return scores_KQP if model.row_scale is None else scores_KQP * model.row_scale[..., None]
