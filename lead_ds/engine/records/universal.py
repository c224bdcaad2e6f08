"""A checkpoint of some number of ranks, read by another: DeepSpeed's universal checkpoint, made when needed, gone after.

ZeRO's optimizer states lie in one file per rank. DeepSpeed joins them into one file per parameter, which any number of
ranks can read. Where every rank keeps everything (ZeRO-0 in float32) there is nothing to join.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.errors import RunError


@contextmanager
def for_this_world(path: Path, processes: int, temporary: Path, engine: Any, ranks: Ranks) -> Iterator[Path]:
    """The folder from which `engine` can load the checkpoint `path`, that was written by `processes` ranks.

    With as many ranks now, that is `path`. Otherwise rank 0 converts it into `temporary`, which is removed at the end, and
    the engine reads universal checkpoints meanwhile. Raises RunError on every rank where the conversion fails.
    """
    if processes == ranks.world or not any(path.glob("*optim_states.pt")):
        yield path
        return
    failure = ""
    if ranks.main:
        try:
            _convert(path, temporary)
        except Exception as error:  # DeepSpeed raises whatever it meets: reported in one line, on every rank
            failure = str(error) or type(error).__name__
    failure = ranks.from_main(failure)
    settings = engine._config
    before = settings.load_universal_checkpoint
    try:
        if failure:
            remedy = f"resume with {processes} processes"
            raise RunError(path, f"could not be converted for {ranks.world} processes: {failure}", remedy)
        settings.load_universal_checkpoint = True
        yield temporary
    finally:
        settings.load_universal_checkpoint = before
        ranks.barrier()
        if ranks.main:
            shutil.rmtree(temporary, ignore_errors=True)


def settle_steps(optimizer: Any) -> None:
    """Step counters as torch's optimizers want them, after DeepSpeed has set them from a checkpoint. In place.

    A universal checkpoint gives all parameter groups of stage 3 one and the same counter, which each would then advance.
    And it leaves them on the CPU, where a fused optimizer does not read them: it wants them beside its parameters.
    """
    beside = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for parameter, state in optimizer.state.items():  # at stage 3 the groups name none between two steps
        step = state.get("step")
        if isinstance(step, torch.Tensor):
            place = {"device": parameter.device, "dtype": torch.float32} if beside else {}
            state["step"] = step.clone().to(**place)


def _convert(source: Path, target: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal

    shutil.rmtree(target, ignore_errors=True)
    arguments = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        # In this process: one that is killed leaves no other behind, and files are read as tensors only.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with tensors_only(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal(arguments)
    (target.parent / "latest_universal").unlink(missing_ok=True)


@contextmanager
def tensors_only() -> Iterator[None]:
    """While open, every torch.load reads tensors and plain values only, also where DeepSpeed asks for any pickle.

    Of its own classes it stores these four; a checkpoint that names any other is refused before it can run code.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            os.environ.pop(name)
        else:
            os.environ[name] = before
