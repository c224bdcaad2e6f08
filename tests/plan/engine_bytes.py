"""What a real DeepSpeed engine holds, counted on each rank; run by `tests.helpers.launch`."""

from __future__ import annotations

import gc
from typing import Any

import torch

from lead_ds.config import Config
from lead_ds.engine.distributed.deepspeed_files import read_deepspeed_config


def student(path: str, stage: int, dtype: str) -> dict[str, int]:
    """Bytes of a student's engine after one step."""
    from lead_ds.data.reads import ModelBatch
    from lead_ds.engine.distributed.ranks import ranks
    from lead_ds.engine.training.trainee import Trainee, build_engine
    from lead_ds.models.load import load_student

    class Bare(Trainee):
        """Without losses: the student's own answer."""

        def forward(self, batch: ModelBatch) -> Any:  # type: ignore[override]
            return self.student(batch)

    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    with ranks() as joined:
        config = settings(path, stage)
        engine = build_engine(Bare(load_student(config.student, kinds[dtype])), config, kinds[dtype], joined)
        tokens = {"input_ids": torch.ones(2, 8, dtype=torch.long), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
        output = engine(ModelBatch(1, queries=tokens, passages=tokens))
        engine.backward(output.final.q_KQD.float().square().sum() + output.final.p_KPD.float().square().sum())
        engine.step()
        optimizer = engine.optimizer
        inner = getattr(optimizer, "optimizer", optimizer)
        master = 0
        if stage in (1, 2):
            master = storages(optimizer.single_partition_of_fp32_groups)
        elif stage == 3:
            master = storages(optimizer.fp32_partitioned_groups_flat)
        elif dtype != "fp32":
            master = storages([p for group in inner.param_groups for p in group["params"]])
        parameters = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
        moments = [x for state in inner.state.values() for x in state.values() if torch.is_tensor(x) and x.dim()]
        return {"parameters": storages(parameters), "master": master, "moments": storages(moments)}


def teacher(path: str, max_live: int | str) -> dict[str, int]:
    """Bytes of a frozen ZeRO-3 teacher's shard, the most that is gathered in a forward pass, and what stays so after it."""
    from lead_ds.data.reads import ModelBatch
    from lead_ds.engine.distributed.ranks import ranks
    from lead_ds.teachers.frozen import build_teacher
    from lead_ds.teachers.teacher import Lesson
    from tests.helpers.sharded import resident_parameters

    with ranks() as joined:
        config = settings(path, 1, teacher=True)
        zero3 = read_deepspeed_config("ds_configs/teacher_zero3.json")
        zero3["zero_optimization"]["stage3_max_live_parameters"] = max_live
        lesson = Lesson.of(
            config.model_copy(update={"deepspeed": config.deepspeed.model_copy(update={"teacher": zero3})})
        )
        frozen = build_teacher(lesson, joined)
        tokens = {"input_ids": torch.ones(2, 8, dtype=torch.long), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
        batch = [ModelBatch(1, queries=tokens, passages=tokens)]
        frozen.window(batch, [0])  # the first finds out the order of parameters
        gathered: list[int] = []
        for module in frozen.scorer.modules():
            module.register_forward_pre_hook(lambda *_: gathered.append(gathered_now(frozen.scorer)))
        frozen.window(batch, [0])
        resident = 2 * resident_parameters(frozen.scorer)[1]
        return {"shard": frozen.parameter_bytes()[0], "gathered": 2 * max(gathered), "resident": resident}


def gathered_now(module: torch.nn.Module) -> int:
    """Elements of parameters that are whole here, or on their way."""
    shards: list[Any] = list(module.parameters())  # Any: `ds_status` and `ds_numel` are DeepSpeed's
    return sum(p.ds_numel for p in shards if p.ds_status.name != "NOT_AVAILABLE")


def settings(path: str, stage: int, teacher: bool = False) -> Config:
    """A run of a model at `path`, its weights random."""
    off = {name: {"weight": 0.0} for name in ("response", "layer")}
    tree: dict[str, Any] = {
        "student": {"path": path, "weights": "random", "projection": 10},
        "data": {"path": "data"},
        "losses": {} if teacher else off,
        "deepspeed": {"student": f"ds_configs/student_zero{stage}.json"},
        "monitor": {"tensorboard": False, "csv": False},
    }
    if teacher:
        tree["teacher"] = {
            "kind": "dual_encoder",
            "path": path,
            "weights": "random",
            "placement": "zero3",
            "dtype": "bf16",
        }
    return Config.model_validate(tree)


def storages(tensors: Any) -> int:
    """Bytes of what tensors lie in, each storage once."""
    gc.collect()
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
