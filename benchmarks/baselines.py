"""What a user would run instead, on one process: LEAD's loop as published, and the plain loop that Hugging Face's pages teach.

Both are written from descriptions (LEAD: arXiv 2212.05225 and what is known of its released code), with a frozen teacher, and
the losses of `lead_ds.losses.objective`: contrastive, response and layer. Neither uses anything of lead-ds.

Dimensions: Q queries, P = Q * N passages, B texts, L tokens, D width; query i's positive is passage i * N.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Tokens = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """What the losses depend on, by the names of lead-ds's configuration."""

    group_size: int  # N
    teacher_temperature: float
    layer_teacher_temperature: float
    layer_temperature: float
    clip: float
    teacher_pooling: str  # cls, last
    teacher_cosine: bool
    lr: float
    reranker: tuple[int, int] | None = None  # the tokens of yes and no


@dataclass(frozen=True)
class Texts:
    """The tokens of a micro-batch: the student's, and the teacher's own (queries and passages, or pairs)."""

    student_queries: Tokens
    student_passages: Tokens
    teacher_queries: Tokens | None = None
    teacher_passages: Tokens | None = None
    teacher_pairs: Tokens | None = None


class Loop(ABC):
    """Both loops: an optimizer step a micro-batch or several; `at` is called with what begins."""

    name: str
    pads_to_maximum = False

    def __init__(self, teacher: nn.Module, student: nn.Module, settings: Settings, device: torch.device) -> None:
        self.teacher, self.student, self.settings, self.device = teacher, student, settings, device
        self.teacher.requires_grad_(False).eval()
        self.student.train()
        fused = device.type == "cuda"
        parameters = [p for p in student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0, fused=fused)

    def step(
        self, batches: Sequence[Texts], layers: tuple[list[int], list[int]], at: Callable[[Any], None]
    ) -> dict[str, float]:
        """One optimizer step; the first micro-batch's losses, read once at the end."""
        first: dict[str, Tensor] = {}
        for texts in batches:
            losses = self.losses(texts, layers, at)
            at("backward")
            (torch.stack(list(losses.values())).sum() / len(batches)).backward()
            first = first or {name: loss.detach() for name, loss in losses.items()}
        at("optimizer")
        nn.utils.clip_grad_norm_(self.student.parameters(), self.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        at("statistics")
        return {name: loss.item() for name, loss in first.items()}

    @abstractmethod
    def losses(self, texts: Texts, layers: tuple[list[int], list[int]], at: Callable[[Any], None]) -> dict[str, Tensor]:
        """The losses of a micro-batch by name."""

    def moved(self, tokens: Tokens | None) -> Tokens:
        """The same on the device."""
        assert tokens is not None
        return {name: x.to(self.device) for name, x in tokens.items()}


class LeadLoop(Loop):
    """LEAD as published: float32, every text padded to its maximum, all tokens of all layers kept, layers one by one."""

    name = "LEAD's loop"
    pads_to_maximum = True

    def losses(self, texts: Texts, layers: tuple[list[int], list[int]], at: Callable[[Any], None]) -> dict[str, Tensor]:
        at("teacher forward")
        with torch.no_grad():
            tq = self.teacher(**self.moved(texts.teacher_queries), output_hidden_states=True).hidden_states
            tp = self.teacher(**self.moved(texts.teacher_passages), output_hidden_states=True).hidden_states
        at("student forward")
        sq = self.student(**self.moved(texts.student_queries), output_hidden_states=True).hidden_states
        sp = self.student(**self.moved(texts.student_passages), output_hidden_states=True).hidden_states
        at("losses")
        target = torch.arange(len(sq[-1]), device=self.device) * self.settings.group_size
        teacher, student = tq[-1][:, 0] @ tp[-1][:, 0].T, sq[-1][:, 0] @ sp[-1][:, 0].T
        response = kl(teacher / self.settings.teacher_temperature, student)
        kls, nlls = [], []
        for t, s in zip(*layers, strict=True):  # entry 0 is the embeddings
            teacher_layer = tq[t + 1][:, 0] @ tp[t + 1][:, 0].T
            student_layer = sq[s + 1][:, 0] @ sp[s + 1][:, 0].T
            kls.append(kl(teacher_layer / self.settings.layer_teacher_temperature, student_layer))
            nlls.append(functional.cross_entropy(teacher_layer, target))
        weights = torch.softmax(-torch.stack(nlls) / self.settings.layer_temperature, 0)
        layer = sum(w * value for w, value in zip(weights, kls, strict=True))
        return {"contrastive": functional.cross_entropy(student, target), "response": response, "layer": layer}


class PlainLoop(Loop):
    """Two models, each text padded to the longest of its batch, hidden states kept, losses in eager torch. Mixed
    precision on a GPU; a decoder's layers are read through its final norm."""

    name = "plain loop"

    def losses(self, texts: Texts, layers: tuple[list[int], list[int]], at: Callable[[Any], None]) -> dict[str, Tensor]:
        at("teacher forward")
        with torch.no_grad():
            if self.settings.reranker is None:
                tq = self._teacher_vectors(self.moved(texts.teacher_queries), layers[0])
                tp = self._teacher_vectors(self.moved(texts.teacher_passages), layers[0])
                teacher = torch.stack([q @ p.T for q, p in zip(tq, tp, strict=True)])
            else:
                teacher = self._teacher_scores(self.moved(texts.teacher_pairs), layers[0])
        at("student forward")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            queries = self.student(**self.moved(texts.student_queries), output_hidden_states=True).hidden_states
            passages = self.student(**self.moved(texts.student_passages), output_hidden_states=True).hidden_states
        at("losses")
        chosen = [*layers[1], len(queries) - 2]
        sq, sp = ([states[i + 1][:, 0].float() for i in chosen] for states in (queries, passages))
        whole = torch.stack([q @ p.T for q, p in zip(sq, sp, strict=True)])
        target = torch.arange(whole.shape[1], device=self.device) * self.settings.group_size
        contrastive = functional.cross_entropy(whole[-1], target)
        student = whole
        if self.settings.reranker is not None:  # it knows a query's own passages only
            grouped = torch.stack(sp).unflatten(1, (-1, self.settings.group_size))
            student = torch.einsum("kqd,kqnd->kqn", torch.stack(sq), grouped)
            target = torch.zeros_like(target)
        response = kl(teacher[-1] / self.settings.teacher_temperature, student[-1])
        pairs = list(zip(teacher[:-1], student[:-1], strict=True))
        kls = torch.stack([kl(t / self.settings.layer_teacher_temperature, s) for t, s in pairs])
        nlls = torch.stack([functional.cross_entropy(t, target) for t, _ in pairs])
        weights = torch.softmax(-nlls / self.settings.layer_temperature, 0)
        return {"contrastive": contrastive, "response": response, "layer": (weights * kls).sum()}

    def _teacher_vectors(self, tokens: Tokens, layers: Sequence[int]) -> list[Tensor]:
        """Of each of `layers`, then of the final state: [B, D]."""
        output = self.teacher(**tokens, output_hidden_states=True)
        states = [output.hidden_states[i + 1] for i in layers]
        pooled = [self._pooled(state, tokens["attention_mask"]) for state in states]
        norm = getattr(self.teacher, "norm", None)
        if isinstance(norm, nn.Module):
            last = len(output.hidden_states) - 2  # its entry has passed the norm already
            pooled = [x if i == last else norm(x) for i, x in zip(layers, pooled, strict=True)]
        pooled.append(self._pooled(output.last_hidden_state, tokens["attention_mask"]))
        vectors = [x.float() for x in pooled]
        return [functional.normalize(x, dim=-1) for x in vectors] if self.settings.teacher_cosine else vectors

    def _teacher_scores(self, tokens: Tokens, layers: Sequence[int]) -> Tensor:
        """Of each of `layers`, then of the final state: yes against no at the last token, [K + 1, Q, N]."""
        assert self.settings.reranker is not None
        model: Any = self.teacher
        output = model.model(**tokens, output_hidden_states=True)
        mask = tokens["attention_mask"]
        last = len(output.hidden_states) - 2
        states = []
        for i in layers:
            state = self._pooled(output.hidden_states[i + 1], mask)
            states.append(state if i == last else model.model.norm(state))
        states.append(self._pooled(output.last_hidden_state, mask))
        yes, no = self.settings.reranker
        logits = torch.stack([model.lm_head(state).float() for state in states])
        return (logits[..., yes] - logits[..., no]).unflatten(1, (-1, self.settings.group_size))

    def _pooled(self, state_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        if self.settings.teacher_pooling == "cls" and self.settings.reranker is None:
            return state_BLD[:, 0]
        return state_BLD[torch.arange(len(state_BLD), device=self.device), mask_BL.sum(1) - 1]


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of the logits' distributions [Q, P], the mean over queries."""
    return functional.kl_div(
        functional.log_softmax(student, -1), functional.softmax(teacher, -1), reduction="batchmean"
    )


LOOPS: dict[str, type[Loop]] = {loop.name: loop for loop in (LeadLoop, PlainLoop)}
