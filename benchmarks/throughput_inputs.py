"""What the providers of `benchmarks.throughput` read beside lead-ds's own batches, and what reading it costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines import Texts
from lead_ds.config import Config
from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.engine.training.distill import open_inputs
from lead_ds.losses.selection import NO_LAYERS, Depths
from lead_ds.models.backbone import find_layers, read_model_config
from lead_ds.models.scorer import Scorer
from lead_ds.relevance import pad_tokens

Tokens = dict[str, Tensor]


@dataclass(frozen=True)
class Work:
    """What a step of one rank reads, without padding, and the floating-point operations of its matrix products."""

    queries: int
    passages: int
    teacher_tokens: float
    student_tokens: float
    teacher_flops: float
    student_flops: float


class Inputs:
    """The texts of each step, tokenised before anyone looks at the clock."""

    def __init__(self, config: Config, ranks: Ranks, *, pads_to_maximum: bool = False) -> None:
        self.config = config
        _, _, self.batches, _ = open_inputs(config, ranks)
        self.pads_to_maximum = pads_to_maximum
        self._made: dict[int, list[Texts]] = {}

    def step(self, step: int) -> list[Texts]:
        """The micro-batches of a step; later ones are made while at it, in steps that nobody times."""
        step %= self.batches.steps_per_epoch
        if not self._made:
            self._made = {i: self._step(i) for i in range(min(8, self.batches.steps_per_epoch))}
        return self._made[step % len(self._made)]

    def layers(self, step: int) -> tuple[list[int], list[int]]:
        """The layers that lead-ds compares at a step."""
        depths = Depths(read_depth(self.config.teacher), read_depth(self.config.student), self.config.seed)
        return self.config.losses.pairs(depths, step).get("layer", NO_LAYERS)

    def _step(self, step: int) -> list[Texts]:
        batches, encoder = self.batches, self.batches.student.encoder
        assert encoder is not None
        groups = [batches.groups.draw(int(row), batches.seed, 0) for row in batches.rows(step)]
        made = []
        for first in range(0, len(groups), batches.batch_size):
            part = groups[first : first + batches.batch_size]
            queries = [group.query for group in part]
            passages = [passage for group in part for passage in group.passages]
            student = self.config.student
            texts = Texts(
                self._padded(encoder.queries(queries), student.query_length),
                self._padded(encoder.passages(passages), student.passage_length),
            )
            taught = next((teacher.encoder for teacher in batches.teachers.values()), None)
            if taught is not None:
                texts = replace(texts, **self._taught(taught, queries, passages))
            made.append(texts)
        return made

    def _taught(self, encoder: TextEncoder, queries: list[str], passages: list[str]) -> dict[str, Tokens]:
        teacher = self.config.teacher
        assert teacher is not None
        if encoder.reads_pairs:
            repeated = [query for query in queries for _ in range(self.batches.group_size)]
            return {"teacher_pairs": self._padded(encoder.pairs(repeated, passages), teacher.max_length)}
        return {
            "teacher_queries": self._padded(encoder.queries(queries), teacher.query_length),
            "teacher_passages": self._padded(encoder.passages(passages), teacher.passage_length),
        }

    def _padded(self, tokens: Tokens, length: int) -> Tokens:
        return {name: pad_tokens(x, 1, length) for name, x in tokens.items()} if self.pads_to_maximum else tokens

    def work(self, student: nn.Module, teacher: nn.Module | None) -> Work:
        """Of an average step of those made."""
        steps = list(self._made.values())
        micro = [texts for step in steps for texts in step]
        taught = [x for t in micro for x in (t.teacher_queries, t.teacher_passages, t.teacher_pairs) if x is not None]
        learnt = [x for t in micro for x in (t.student_queries, t.student_passages)]
        tokens, flops = zip(
            *(costs(model, batch) for model, batch in ((teacher, taught), (student, learnt))), strict=True
        )
        return Work(
            self.batches.batch_size * self.batches.accumulation,
            self.batches.batch_size * self.batches.accumulation * self.batches.group_size,
            tokens[0] / len(steps),
            tokens[1] / len(steps),
            flops[0] / len(steps),
            3 * flops[1] / len(steps),
        )


def costs(model: nn.Module | None, batches: list[Tokens]) -> tuple[float, float]:
    """Tokens that are not padding, and FLOP of a forward over them: products with the layers' parameters, and attention's."""
    if model is None or not batches:
        return 0.0, 0.0
    backbone: Any = model.backbone if isinstance(model, Scorer) else model
    backbone = backbone.base_model
    _, layers = find_layers(backbone)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in layers.parameters())
    shape = backbone.config.get_text_config()
    heads, width = shape.num_attention_heads, shape.hidden_size
    attended = heads * (getattr(shape, "head_dim", None) or width // heads)
    lengths = torch.cat([tokens["attention_mask"].sum(1) for tokens in batches]).double()
    tokens = float(lengths.sum())
    return tokens, 2 * parameters * tokens + 4 * len(layers) * attended * float(lengths.square().sum())


def read_depth(settings: Any) -> int:
    """How many layers a model's configuration names."""
    return int(read_model_config(settings).get_text_config().num_hidden_layers)
