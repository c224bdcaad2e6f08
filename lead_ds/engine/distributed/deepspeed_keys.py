"""The keys of DeepSpeed's JSON that have an effect in a run. DeepSpeed drops what it does not know without a word, and a
misspelt `zero_optimization` with it; so any other key is refused here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lead_ds.errors import InputError

NUMBER = (int, float)
# Each key, and the types that its value may have. "auto" may stand for any; what is filled in is in deepspeed_files.
USED: dict[str, tuple[type, ...]] = {
    "zero_optimization": (dict,),
    "zero_allow_untested_optimizer": (bool,),
    "zero_force_ds_cpu_optimizer": (bool,),
    "optimizer": (dict,),
    "bf16": (dict,),
    "fp16": (dict,),
    "data_types": (dict,),
    "train_batch_size": (int,),
    "train_micro_batch_size_per_gpu": (int,),
    "gradient_accumulation_steps": (int,),
    "gradient_clipping": NUMBER,
    "prescale_gradients": (bool,),
    "gradient_predivide_factor": NUMBER,
    "communication_data_type": (str,),
    "disable_allgather": (bool,),
    "disable_python_gc": (bool,),
    "checkpoint": (dict,),
    "aio": (dict,),
    "comms_logger": (dict,),
    "steps_per_print": (int,),
    "wall_clock_breakdown": (bool,),
    "memory_breakdown": (bool,),
    "dump_state": (bool,),
    "tensorboard": (dict,),
    "csv_monitor": (dict,),
    "wandb": (dict,),
    "comet": (dict,),
}
WITHIN = {"optimizer": ("type", "params", "legacy_fusion"), "data_types": ("grad_accum_dtype",)}
INSTEAD = {
    "scheduler": "take it out: train.lr, train.schedule and train.warmup_ratio decide the learning rate",
    "activation_checkpointing": "take it out, and set train.gradient_checkpointing=true",
    "flops_profiler": "take it out, and set profile=true",
    "torch_autocast": "take it out, and set student.dtype",
    "compile": "take it out, and set train.compile=true",
}


def check_keys(tree: Mapping[str, Any], where: str | Path) -> None:
    """Raise InputError for a key that has no effect in a run, and for a value of another type than its key's."""
    for key, value in tree.items():
        if key in INSTEAD:
            raise InputError(where, f"has {'an' if key[0] in 'aeiou' else 'a'} {key}, which is not used", INSTEAD[key])
        if key not in USED:
            _refuse(key, tuple(USED), where)
        kinds = USED[key]
        right = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if not right and value != "auto":
            names = " or ".join(
                {"dict": "an object", "str": "text"}.get(kind.__name__, kind.__name__) for kind in kinds
            )
            raise InputError(where, f"{key} is {value!r}", f"write it as {names}")
        for inner in value if key in WITHIN and isinstance(value, dict) else ():
            if inner not in WITHIN[key]:
                _refuse(inner, WITHIN[key], f"{where}: {key}")


def decide(tree: dict[str, Any], key: str, value: Any, name: str) -> None:
    """Set `key` to what the run's setting `name` says. Raises InputError where the file says otherwise."""
    given = tree.get(key, "auto")
    if given not in ("auto", value):
        what = f"has {key} {given}, and {name} is {value}, which is what is used"
        raise InputError("deepspeed.student", what, f"take it out, and set {name}")
    tree[key] = value


def _refuse(key: str, known: Sequence[str], where: str | Path) -> None:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    remedy = f"did you mean {near[0]!r}?" if near else "take it out; ds_configs/README.md tells what has one"
    raise InputError(where, f"{key!r} has no effect in a run", remedy)
