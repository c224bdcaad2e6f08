"""Tiny models whose layers send each token to a few of many experts, and what two processes say of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lead_ds.config import TeacherConfig
from lead_ds.engine.distributed.ranks import Ranks, ranks
from lead_ds.models.load import load_teacher
from lead_ds.teachers.frozen import build_teacher
from lead_ds.teachers.teacher import Lesson
from tests.helpers.tiny import tiny_tokenizer
from tests.models.tiny_models import tokens_of

EXPERTS = 16
SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE |= {"head_dim": 8, "max_position_embeddings": 130, "num_experts_per_tok": 2, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 24, "intermediate_size": 48, "mlp_only_layers": [1]},
    "mixtral": {"num_local_experts": EXPERTS, "intermediate_size": 24},
}
# As repositories bring it: modules in a list, of which those are called that a token reaches.
CODE = """
import torch
import transformers
from torch import nn


class Block(nn.Module):
    def __init__(self, width, experts):
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList([nn.Linear(width, width) for _ in range(experts)])

    def forward(self, states):
        flat = states.reshape(-1, states.shape[-1])
        weights, chosen = self.gate(flat).softmax(-1).topk(2)
        said = torch.zeros_like(flat)
        for i in chosen.unique().tolist():
            row, place = (chosen == i).nonzero(as_tuple=True)
            said[row] += weights[row, place, None] * self.experts[i](flat[row])
        return said.reshape(states.shape)


class Own(transformers.LlamaModel):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.layers:
            layer.mlp = Block(config.hidden_size, 16)
        self.post_init()
"""


def expert_model(folder: Path, family: str) -> str:
    """Save a random model: of transformers' own code (its weights an expert at a time), or "own": of its directory's."""
    tiny_tokenizer(folder, "bpe")
    size = len(transformers.AutoTokenizer.from_pretrained(str(folder)))
    torch.manual_seed(0)
    if family == "own":
        (folder / "own_code.py").write_text(CODE)
        space: dict[str, Any] = {}
        exec(CODE, space)
        shape = transformers.LlamaConfig(**SHAPE, intermediate_size=48, vocab_size=size)
        model = space["Own"](shape)
    else:
        shape = transformers.AutoConfig.for_model(family, **SHAPE, **FAMILIES[family], vocab_size=size)
        model = transformers.AutoModelForCausalLM.from_config(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if family == "own":
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoModel": "own_code.Own"}}))
    return str(folder)


def sharded(paths: list[str]) -> list[dict[str, Any]]:
    """Of each teacher: its layers under ZeRO-3 beside the whole model's, of tokens that reach other experts on each process."""
    with ranks() as here:
        return [_sharded(path, here) for path in paths]


def _sharded(path: str, here: Ranks) -> dict[str, Any]:
    where: dict[str, Any] = {"path": path, "dtype": "fp32", "placement": "zero3", "trust_remote_code": True}
    config = TeacherConfig(kind="dual_encoder", pooling="last", **where)
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 4096}
    unread: dict[str, Any] = {"losses": None, "data": None, "train": None, "seed": 0, "lens_folder": Path("absent")}
    teacher = build_teacher(Lesson(teacher=config, deepspeed={"zero_optimization": zero}, **unread), here)
    whole = load_teacher(config, torch.float32).requires_grad_(False)
    reached = watched(whole)
    worst, differ, layers = 0.0, True, list(range(teacher.num_layers))
    for step in range(4):
        tokens = tokens_of((1, 2), seed=10 * step + here.rank)
        reached.clear()
        with torch.no_grad():
            theirs = whole(tokens=tokens, layers=layers)
        worst = max(worst, float((teacher.read(tokens, layers) - theirs).abs().max() / theirs.abs().max().clip(1)))
        differ &= len(set(map(str, here.all(sorted(reached))))) == here.world
    return {
        "sharded": all(hasattr(p, "ds_id") for p in teacher.scorer.parameters()),
        "worst": worst,
        "differ": differ,
        "left": sum(p.ds_numel for p in teacher.scorer.parameters() if p.ds_status.name == "AVAILABLE"),
    }


def watched(model: nn.Module) -> set[tuple[str, int]]:
    """The (layer, expert) pairs that a model's tokens reach from now on."""
    reached: set[tuple[str, int]] = set()

    def fused(name: str) -> Any:
        return lambda _, given: reached.update((name, int(i)) for i in given[1].unique())

    def single(name: str, i: int) -> Any:
        return lambda *_: reached.add((name, i))

    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        if isinstance(experts, nn.ModuleList):
            for i, expert in enumerate(experts):
                expert.register_forward_pre_hook(single(name, i))
        elif isinstance(experts, nn.Module):
            experts.register_forward_pre_hook(fused(name))
    return reached
