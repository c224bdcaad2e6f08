"""What the processes of test_zero3 run: sharded scorers beside whole ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lead_ds.config import StudentConfig, TeacherConfig
from lead_ds.data.reads import ModelBatch
from lead_ds.engine.distributed.ranks import ranks
from lead_ds.models.load import load_student, load_teacher, load_text
from lead_ds.models.scorer import Output, Scorer
from lead_ds.models.student_dir import save_student
from tests.models.tiny_models import tokens_of

_ZERO3: dict[str, Any] = {
    "stage": 3,
    "memory_efficient_linear": False,
    "stage3_prefetch_bucket_size": 4096,
    "stage3_param_persistence_threshold": 0,  # nothing, not even a norm, stays gathered
}


def _tree(dtype: torch.dtype) -> dict[str, Any]:
    tree: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": _ZERO3}
    tree["gradient_clipping"] = 0.0  # DeepSpeed clips to 1 where it is not told
    return tree | ({"bf16": {"enabled": True}} if dtype is torch.bfloat16 else {})


def _batch(scorer: Scorer, seed: int) -> ModelBatch:
    if scorer.scope == "group":
        return ModelBatch(group_size=2, pairs=tokens_of((5, 12, 9, 7), seed=seed))
    return ModelBatch(group_size=2, queries=tokens_of((4, 6), seed=seed), passages=tokens_of((5, 12, 9, 7), seed=seed))


def _tensors(output: Output) -> list[Tensor]:
    features = [output.final, output.layers]
    return [x for part in features if part is not None for x in vars(part).values() if isinstance(x, Tensor)]


def teacher(path: str, kind: Any, pooling: Any, weights: Any = "pretrained") -> dict[str, Any]:
    """A frozen teacher sharded in bfloat16 gives, for several selections of layers, bits equal to a whole one's."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    with ranks() as here:
        more: dict[str, Any] = {"yes_token": "y", "no_token": "n"} if kind == "llm_reranker" else {}
        more |= {"pooling": pooling} if kind == "dual_encoder" else {}
        config = TeacherConfig(kind=kind, path=path, weights=weights, **more)
        torch.manual_seed(1)
        whole = load_teacher(config, torch.bfloat16).requires_grad_(False)
        scope = HfDeepSpeedConfig(_tree(torch.bfloat16))
        torch.manual_seed(1)
        sharded = load_teacher(config, torch.bfloat16).requires_grad_(False)
        del scope
        unset_hf_deepspeed_config()
        all_sharded = all(hasattr(p, "ds_id") for p in sharded.parameters())
        engine = deepspeed.initialize(model=sharded, config=_tree(torch.bfloat16))[0]
        engine.eval()
        equal = True
        for step, layers in enumerate([(0, 1), (0, 1), (0, 1), (1, 2), (2,), (), (0, 2)]):
            batch = _batch(whole, seed=10 * step + here.rank)
            with torch.no_grad():
                mine, theirs = _tensors(engine(batch, layers=layers)), _tensors(whole(batch, layers=layers))
            equal &= all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        left = sum(p.ds_numel for p in sharded.parameters() if p.ds_status.name == "AVAILABLE")
        return {"sharded": all_sharded, "equal": equal, "left": left}


def student(path: str, pooling: Any, checkpointing: bool, folder: str) -> dict[str, Any]:
    """A ZeRO-3 student takes the very steps of a whole one through captured layers, and is saved from its shards."""
    import deepspeed

    with ranks() as here:
        config = StudentConfig(path=path, pooling=pooling, projection=8, normalize=True)
        torch.manual_seed(2)
        whole = load_student(config, torch.float32).eval()
        torch.manual_seed(2)
        sharded = load_student(config, torch.float32).eval()
        if checkpointing:
            sharded.gradient_checkpointing_enable()
            sharded.train()
            for module in sharded.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        groups = [p for p in sharded.parameters() if p.requires_grad]
        tree = _tree(torch.float32) | {"zero_allow_untested_optimizer": True}
        engine = deepspeed.initialize(
            model=sharded, model_parameters=groups, optimizer=torch.optim.SGD(groups, lr=0.1), config=tree
        )[0]
        optimizer = torch.optim.SGD([p for p in whole.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for step, layers in enumerate([(0, 2), (1, 2), (0, 1), (0, 1)]):
            loss = _loss(engine(_batch(whole, seed=10 * step + here.rank), layers=layers))
            engine.backward(loss)
            engine.step()
            parts = [_loss(whole(_batch(whole, seed=10 * step + r), layers=layers)) for r in range(here.world)]
            (sum(parts) / here.world).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(parts[here.rank]))
        worst = 0.0
        state: dict[str, Tensor] = {}
        for (name, p), q in zip(sharded.named_parameters(), whole.parameters(), strict=True):
            with deepspeed.zero.GatheredParameters([p]):
                state[name] = p.detach().clone()
                worst = max(worst, float((p.detach() - q.detach()).abs().max()))
        if here.main:
            save_student(sharded, load_text(config), folder, state_dict=state)
        torch.distributed.barrier()
        return {"worst": worst, "losses": losses}


def _loss(output: Output) -> Tensor:
    assert output.layers is not None
    return output.layers.relevance().logits.square().mean() - output.final.relevance().logits.diagonal(0, 1, 2).mean()


def adapter(path: str, base: str) -> dict[str, Any]:
    """The layers of an adapter's sharded teacher beside those of peft's model, whole and not merged, and of the base's."""
    import deepspeed
    import peft
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    with ranks() as here:
        config = TeacherConfig(kind="dual_encoder", path=path, pooling="mean")
        scope = HfDeepSpeedConfig(_tree(torch.float32))
        sharded = load_teacher(config, torch.float32).requires_grad_(False)
        del scope
        unset_hf_deepspeed_config()
        engine = deepspeed.initialize(model=sharded, config=_tree(torch.float32))[0]
        engine.eval()
        tokens, layers = tokens_of((5, 12), seed=here.rank), (0, 1, 2)
        plain = config.model_copy(update={"path": base})
        adapted = load_teacher(plain, torch.float32)
        peft.PeftModel.from_pretrained(adapted.model, path)  # it puts its layers into the model itself
        with torch.no_grad():
            ours, theirs = engine(tokens=tokens, layers=layers), adapted(tokens=tokens, layers=layers)
            alone = load_teacher(plain, torch.float32)(tokens=tokens, layers=layers)
        return {
            "sharded": all(hasattr(p, "ds_id") for p in sharded.parameters()),
            "worst": float((ours - theirs).abs().max()),
            "unlike_base": float((ours - alone).abs().max()),
        }
