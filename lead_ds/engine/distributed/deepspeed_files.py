"""DeepSpeed's JSON configurations: found by path or by name, checked, and their "auto" values filled in for a run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from lead_ds.engine.distributed.deepspeed_keys import check_keys, decide
from lead_ds.errors import InputError
from lead_ds.settings.documents import read_json
from lead_ds.settings.train import MonitorConfig, TrainConfig

OF_TRAINING = (
    "optimizer",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "gradient_predivide_factor",
    "prescale_gradients",
)
FLAGS = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def read_deepspeed_config(source: str | dict[str, Any]) -> dict[str, Any]:
    """The dictionary at a path, a name in ds_configs/ (of the repository, or of the installed package), or itself.

    Raises InputError where there is no such file, or it is not a JSON object.
    """
    if isinstance(source, dict):
        return _checked(json.loads(json.dumps(source)), "deepspeed")
    name = Path(source)
    package = Path(__file__).resolve().parents[2]
    candidates = [
        name,
        package.parent / name,
        package / "_ds_configs" / name.name,
        package.parent / "ds_configs" / name.name,
    ]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise InputError(source, "no such DeepSpeed configuration", "see ds_configs/ for those that come with lead-ds")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(path, f"cannot be read: {error}", "it must be JSON in UTF-8") from None
    tree = read_json(text, path)
    if not isinstance(tree, dict):
        raise InputError(path, "not a JSON object", "a DeepSpeed configuration is an object")
    return _checked(tree, path)


def _checked(tree: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """The tree, whose keys have an effect, whose sections that are read here are objects and whose ZeRO stage is one."""
    zero = tree.get("zero_optimization", {})
    sections = {"zero_optimization": zero, "optimizer": tree.get("optimizer", {})}
    if isinstance(sections["optimizer"], dict):
        sections["optimizer.params"] = sections["optimizer"].get("params", {})
    if isinstance(zero, dict):
        sections |= {f"zero_optimization.{key}": zero.get(key) or {} for key in ("offload_param", "offload_optimizer")}
    for key, section in sections.items():
        if not isinstance(section, dict):
            raise InputError(where, f"{key} is not an object", f'write {{"{key.rpartition(".")[2]}": {{...}}}}')
    if zero.get("stage", 0) not in (0, 1, 2, 3):
        raise InputError(where, f"zero_optimization.stage is {zero['stage']!r}", "choose 0, 1, 2 or 3")
    check_keys(tree, where)
    return tree


def zero_stage(tree: dict[str, Any]) -> int:
    """The ZeRO stage that a configuration asks for."""
    return int(tree.get("zero_optimization", {}).get("stage", 0))


def _check_optimizer(tree: dict[str, Any], train: TrainConfig) -> None:
    """Refuse what the run's own settings would silently override."""
    parameters = tree.get("optimizer", {}).get("params", {})
    for key, ours in (("lr", train.lr), ("weight_decay", train.weight_decay)):
        if parameters.get(key, ours) == "auto":
            parameters[key] = ours
        if parameters.get(key, ours) != ours:
            what = f"its optimizer's {key} is {parameters[key]}, train.{key} is {ours}, which is what is used"
            raise InputError("deepspeed.student", what, f"take it out, and set train.{key}")


def student_deepspeed_config(
    source: str | dict[str, Any], train: TrainConfig, monitor: MonitorConfig, output: Path, dtype: torch.dtype
) -> dict[str, Any]:
    """The student engine's configuration for this run: the JSON with batch sizes, precision, clipping and monitors."""
    tree = read_deepspeed_config(source)
    _check_optimizer(tree, train)
    decide(tree, "train_micro_batch_size_per_gpu", train.batch_size, "train.batch_size")
    decide(tree, "gradient_accumulation_steps", train.accumulation, "train.accumulation")
    decide(tree, "gradient_clipping", train.clip, "train.clip")
    if tree.get("train_batch_size") == "auto":  # a number is compared by DeepSpeed, which knows the processes
        del tree["train_batch_size"]
    tree.setdefault("steps_per_print", 10**9)
    tree.setdefault("wall_clock_breakdown", False)
    _set_precision(tree, dtype)
    if dtype == torch.float16 and zero_stage(tree) == 0:
        # Its optimizers without ZeRO divide gradients by a loss scale that its engine has not multiplied the loss by.
        what = (
            "trains in fp16 with ZeRO stage 0, where DeepSpeed does not scale the loss: the student would barely learn"
        )
        raise InputError("deepspeed.student", what, "set deepspeed.student=ds_configs/student_zero1.json")
    if tree.get("zero_optimization", {}).get("offload_optimizer") and "optimizer" not in tree:
        tree.setdefault("zero_force_ds_cpu_optimizer", False)
    monitor_folder = str(output.absolute() / "monitor")
    for key, wanted in (("tensorboard", monitor.tensorboard), ("csv_monitor", monitor.csv), ("wandb", monitor.wandb)):
        if wanted and key in tree:
            name = f"monitor.{key.removesuffix('_monitor')}"
            raise InputError("deepspeed.student", f"has {key}, and so has the run ({name}: true)", "keep one of them")
    if monitor.tensorboard:
        tree["tensorboard"] = {"enabled": True, "output_path": monitor_folder, "job_name": "tensorboard"}
    if monitor.csv:
        tree["csv_monitor"] = {"enabled": True, "output_path": monitor_folder, "job_name": "csv"}
    _refuse_auto(tree, "deepspeed.student")
    if monitor.wandb:
        if importlib.util.find_spec("wandb") is None:
            raise InputError("monitor.wandb", "wandb is not installed", "pip install wandb, or set it to false")
        tree["wandb"] = {"enabled": True, "project": monitor.project}
    return tree


def teacher_deepspeed_config(
    source: str | dict[str, Any],
    dtype: torch.dtype,
    *,
    hidden: int,
    layer: int,
    shard: int,
    local_world: int,
    offload: str,
    offload_path: str | None,
) -> dict[str, Any]:
    """A frozen teacher's ZeRO-3 configuration, its "auto" values computed from the width, and the elements of a layer and of
    the largest parameter's shard.

    A prefetch bucket holds one layer (12 hidden^2 parameters); tensors up to 10 hidden (norms, biases) stay resident. Each
    module begins another bucket, so that it is the limit of two layers that keeps the rest of the model where it is. A
    buffer of a disk holds any shard.
    """
    tree = read_deepspeed_config(source)
    zero = tree.setdefault("zero_optimization", {})
    if zero_stage(tree) != 3:
        raise InputError(str(source), "a sharded teacher needs ZeRO stage 3", "or set teacher.placement=replicate")
    for key in OF_TRAINING:
        if tree.pop(key, "auto") != "auto":
            raise InputError("deepspeed.teacher", f"has {key}, and a frozen teacher is not trained", "take it out")
    tree["train_micro_batch_size_per_gpu"] = 1
    tree.setdefault("steps_per_print", 10**9)
    # zero.Init replaces F.linear for the whole process, and never puts it back: the student would inherit it.
    zero["memory_efficient_linear"] = False
    _auto(zero, "stage3_prefetch_bucket_size", 12 * hidden * hidden)
    _auto(zero, "stage3_param_persistence_threshold", 10 * hidden)
    _auto(zero, "stage3_max_live_parameters", 2 * layer)
    _auto(zero, "zero_hpz_partition_size", local_world)
    if offload != "none" and "offload_param" not in zero:
        zero["offload_param"] = {"device": offload, "pin_memory": torch.cuda.is_available()}
    if "offload_param" in zero:
        parameters = zero["offload_param"]
        if not torch.cuda.is_available():
            parameters["pin_memory"] = False
        if parameters.get("device") == "nvme":
            _auto(parameters, "nvme_path", str(offload_path or ""))
            parameters.setdefault("nvme_path", str(offload_path or ""))
            parameters.setdefault("buffer_size", "auto")
            _auto(parameters, "buffer_size", shard)
            if not parameters["nvme_path"]:
                raise InputError("teacher.offload_path", "is not set", "name a folder on a local NVMe disk")
    _set_precision(tree, dtype)
    _refuse_auto(tree, "deepspeed.teacher")
    return tree


def _auto(section: dict[str, Any], key: str, value: Any) -> None:
    if section.get(key) == "auto":
        section[key] = value


def _refuse_auto(tree: Any, where: str, name: str = "") -> None:
    """Raise InputError for an "auto" that is left: DeepSpeed itself knows none, and ends in an error of types."""
    for key, value in tree.items():
        if value == "auto" or (isinstance(value, list) and "auto" in value):
            says = "is" if value == "auto" else "holds"
            what = f'{name}{key} {says} "auto", which is filled in for transformers\' Trainer alone'
            raise InputError(where, what, "write the number, or take it out: DeepSpeed's own default holds then")
        if isinstance(value, dict):
            _refuse_auto(value, where, f"{name}{key}.")


def has_fp16() -> bool:
    """Whether DeepSpeed trains in float16 here."""
    return torch.cuda.is_available()


def _set_precision(tree: dict[str, Any], dtype: torch.dtype) -> None:
    for flag in FLAGS.values():
        if flag in tree and not isinstance(tree[flag], dict):
            raise InputError(flag, "must be an object in a DeepSpeed configuration", 'write {"enabled": true}')
        if FLAGS.get(dtype) != flag and tree.pop(flag, {}).get("enabled") is True:
            what = f"has {flag}, and the model is read in {str(dtype).removeprefix('torch.')}, which is what is used"
            raise InputError("deepspeed", what, "take it out, and set dtype of the model")
    if dtype == torch.float16 and not has_fp16():
        raise InputError("dtype", "fp16 is for GPUs: DeepSpeed has none on a CPU", "set dtype to bf16, fp32 or auto")
    if dtype in FLAGS:
        tree.setdefault(FLAGS[dtype], {})["enabled"] = True
