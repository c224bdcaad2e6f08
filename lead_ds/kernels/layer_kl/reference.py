"""Layer-relevance KL in plain torch with both full score maps: what every other implementation is tested against."""

import torch
from torch import Tensor


def layer_kl_reference(
    tq: Tensor,
    td: Tensor,
    sq: Tensor,
    sd: Tensor,
    target: Tensor,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    *,
    mask: Tensor | None = None,
    cosine: tuple[bool, bool] = (False, False),
) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) and the teacher's NLL of `target`, per layer pair; differentiable, in the inputs' dtypes.

    Shapes and meaning as in `lead_ds.kernels.layer_kl`. LEAD, https://arxiv.org/abs/2212.05225.
    """
    if cosine[0]:
        tq, td = torch.nn.functional.normalize(tq, dim=-1), torch.nn.functional.normalize(td, dim=-1)
    if cosine[1]:
        sq, sd = torch.nn.functional.normalize(sq, dim=-1), torch.nn.functional.normalize(sd, dim=-1)
    t_KQP, s_KQP = tq @ td.mT, sq @ sd.mT
    hidden_QP = torch.zeros(t_KQP.shape[1:], dtype=torch.bool, device=tq.device)
    if mask is not None:
        hidden_QP = ~mask.bool()
        hidden_QP[torch.arange(len(target)), target] = False
    t_KQP, s_KQP = t_KQP.masked_fill(hidden_QP, float("-inf")), s_KQP.masked_fill(hidden_QP, float("-inf"))
    log_p = torch.log_softmax(t_KQP / teacher_temperature, dim=-1).masked_fill(hidden_QP, 0)
    log_r = torch.log_softmax(s_KQP / student_temperature, dim=-1).masked_fill(hidden_QP, 0)
    kl_KQ = (log_p.exp() * (log_p - log_r)).masked_fill(hidden_QP, 0).sum(dim=-1)
    target_KQ1 = target.expand(t_KQP.shape[0], -1)[..., None]
    nll_KQ = -torch.log_softmax(t_KQP, dim=-1).gather(-1, target_KQ1).squeeze(-1)
    return kl_KQ.mean(dim=-1), nll_KQ.mean(dim=-1).detach()
