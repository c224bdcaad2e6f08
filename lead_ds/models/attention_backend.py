"""The attention backend by measurement: `attention: auto` on a GPU where flash-attn is installed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.models.scorer import Scorer
from lead_ds.settings.model import ModelConfig

RUNS = 3  # of each backend, after one that warms up


def candidates(settings: ModelConfig, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Backends worth measuring: none where the configuration names one, or where there is no choice."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    half = dtype in (torch.float16, torch.bfloat16)
    if settings.attention != "auto" or device.type != "cuda" or not half:
        return []
    found = ["flash_attention_2"] if is_flash_attn_2_available() else []
    if is_flash_attn_3_available() and torch.cuda.get_device_capability(device)[0] == 9:  # it is for Hopper
        found.append("flash_attention_3")
    return ["sdpa", *found] if found else []


def choose_attention(
    scorer: Scorer, backends: Sequence[str], run: Callable[[], Any], ranks: Ranks, known: str | None = None
) -> dict[str, float]:
    """Give a scorer the backend with which `run` is fastest on the slowest rank. Seconds of each that the model has.

    known: what was measured before the run was interrupted, which is taken as it is: another backend rounds otherwise.
    Every rank calls this; with fewer than two backends the scorer stays as it is.
    """
    model, seconds = scorer.backbone, dict[str, float]()
    if known in backends:
        model.set_attn_implementation(known)
        return seconds
    if len(backends) < 2:
        return seconds
    before = model.config._attn_implementation
    for backend in backends:
        try:
            model.set_attn_implementation(backend)
        except (ValueError, ImportError):  # not of this architecture: the same on every rank
            continue
        if model.config._attn_implementation == backend:
            seconds[backend] = max(ranks.all(_median(run, ranks.device)))
    model.set_attn_implementation(min(seconds, key=lambda backend: seconds[backend]) if seconds else before)
    return seconds


def _median(run: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(RUNS + 1):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
