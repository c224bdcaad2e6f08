"""16-bit features reach the kernels, and cross the ranks, as they are: a whole step of every kind of student."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import launch

Configure = Callable[..., Path]

# student, teacher, the kernels that a step of theirs calls
KINDS = [
    ("dual_encoder", "dual_encoder", {"layer_kl"}),
    ("colbert", "colbert", {"maxsim"}),
    ("cross_encoder", "cross_encoder", set()),
]


@pytest.mark.parametrize(("student", "teacher", "kernels"), KINDS, ids=[kind[0] for kind in KINDS])
def test_kernels_are_given_16_bits(configure: Configure, student: str, teacher: str, kernels: set[str]) -> None:
    sections: dict[str, Any] = {
        "student": {"kind": student, "dtype": "bf16", "normalize": False},
        "extra_teacher": {"dtype": "bf16", "placement": "replicate", "scale": "none"},
        "train": {"steps": 1, "in_batch": "global"},
    }
    if student == "cross_encoder":
        sections["student"] = {"kind": "cross_encoder", "path": "cross", "max_length": 64, "dtype": "bf16"}
        sections["extra_teacher"].pop("scale")
    path = configure(f"dtypes-{student}", teacher, **sections)
    for seen in launch("tests.engine.dtype_jobs:traced", 2, path=str(path)):
        called = {name.removeprefix("lead_ds.") for name in seen if name.startswith("lead_ds.")}
        assert called == kernels | {f"{name}_backward" for name in kernels}
        for name in kernels:
            assert {dtype for call in seen[f"lead_ds.{name}"] for dtype in call} == {"bfloat16"}, seen
        gathered = {dtype for name, calls in seen.items() if "allgather" in name for call in calls for dtype in call}
        # Scores of pairs cross no ranks; what may be seen then are ZeRO's own parameters.
        assert gathered == {"bfloat16"} if kernels else gathered <= {"bfloat16"}, seen
