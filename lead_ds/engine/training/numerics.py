"""What lets two runs of one configuration round differently: the attention backend, and a GPU's sums in no fixed order."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from lead_ds.data.batches import Batches
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.engine.training.trainee import Trainee
from lead_ds.errors import InputError
from lead_ds.models.attention_backend import candidates, choose_attention
from lead_ds.settings.model import ModelConfig

# On a CPU the backward pass of torch's fused attention is slow in bfloat16, however short its rows: a layer of 384 features
# and rows of 32 to 128 tokens takes 1.8 to 2.0 times as long as with eager attention, 1.1 times at 256, 0.7 at 512.
SHORT_ROW = 128

# What cuBLAS (its workspaces) and transformers (flash attention's backward) read.
_FIXED_ORDER = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}
_NONE = "does not have a deterministic implementation"  # torch's words


@contextmanager
def fixed_order(wanted: bool) -> Iterator[None]:
    """While open, where wanted, sums are taken in a fixed order: `train.deterministic`. Open before the GPU is used.

    Raises InputError where an operation knows none.
    """
    if not wanted:
        yield
        return
    before = {name: os.environ.get(name) for name in _FIXED_ORDER}
    memory: Any = torch.utils.deterministic
    mode, filled = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    os.environ.update({name: value for name, value in _FIXED_ORDER.items() if before[name] is None})
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # nothing here reads what was not written
    try:
        yield
    except RuntimeError as error:
        if "CUBLAS_WORKSPACE_CONFIG" in str(error):
            what, remedy = (
                "is true, and this process has used the GPU before",
                "export CUBLAS_WORKSPACE_CONFIG=:4096:8 first",
            )
            raise InputError("train.deterministic", what, remedy) from error
        if _NONE not in str(error):
            raise
        what = f"is true, and {' '.join(str(error).split(_NONE)[0].split())} knows no fixed order"
        raise InputError("train.deterministic", what, "set it to false") from error
    finally:
        torch.use_deterministic_algorithms(mode)
        memory.fill_uninitialized_memory = filled
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


def fit_attention(
    trainee: Trainee,
    settings: ModelConfig,
    batches: Batches,
    dtype: torch.dtype,
    ranks: Ranks,
    known: str | None = None,
) -> None:
    """Give the student the attention backend that is the fastest for it, forward and backward; or the one that is known."""
    if settings.attention == "auto" and dtype == torch.bfloat16 and ranks.device.type == "cpu":
        _fit_on_a_cpu(trainee, batches, ranks, known)
        return
    backends = candidates(settings, dtype, ranks.device)
    if not backends:
        return
    sample = batches.window(0).student[0].to(ranks.device)

    def run() -> None:
        final = trainee.student(sample).final
        final.group_relevance(batches.group_size).logits.sum().backward()

    choose_attention(trainee.student, backends, run, ranks, known)
    trainee.zero_grad(set_to_none=True)


def _fit_on_a_cpu(trainee: Trainee, batches: Batches, ranks: Ranks, known: str | None) -> None:
    """Eager attention for short rows. By their length, not by the clock: a CPU's runs have the same bits each time."""
    if hasattr(getattr(trainee.student, "backbone", None), "set_attn_implementation"):
        read = [
            tokens for one in batches.window(0).student for tokens in (one.passes.tokens if one.passes else one.tables)
        ]
        longest = max(tokens["input_ids"].shape[1] for tokens in read)
        if known is None and max(ranks.all(longest)) <= SHORT_ROW:
            known = "eager"
        choose_attention(trainee.student, ["sdpa", "eager"] if known else [], lambda: None, ranks, known)


def backends_of(models: Mapping[str, Any]) -> dict[str, str]:
    """The attention backend of each model that transformers runs: what a checkpoint keeps, for it may have been measured."""
    shapes = {key: getattr(getattr(one, "scorer", one), "backbone", None) for key, one in models.items()}
    found = {key: getattr(getattr(one, "config", None), "_attn_implementation", None) for key, one in shapes.items()}
    return {key: backend for key, backend in found.items() if isinstance(backend, str)}
