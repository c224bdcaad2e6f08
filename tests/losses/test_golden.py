"""The objective against values and gradients of the method's reference implementation (files outside the repository)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lead_ds.config import losses_section
from lead_ds.losses import LossShape, ModelFacts, Objective, Scope, Side, Views
from lead_ds.relevance import Features, ScoreFeatures, TokenFeatures, VectorFeatures

SHARED = Path(os.environ.get("LEAD_DS_SHARED", Path(__file__).resolve().parents[3] / "shared"))
FILES = ["de_reweight", "de_uniform_colearn", "de_virt", "col_reweight", "ce_reweight"]


@dataclass
class Tap:
    """Token states as one head, unscaled."""

    q: Tensor
    k: Tensor
    mask: Tensor
    scale: float = 1.0
    causal: bool = False
    window: int | None = None

    @classmethod
    def of(cls, states_BLD: Tensor, lengths_B: Tensor) -> Tap:
        mask_BL = torch.arange(states_BLD.shape[1]) < lengths_B[:, None]
        return cls(states_BLD[:, None], states_BLD[:, None], mask_BL)


def cls_vectors(q: Tensor, p: Tensor, layers: list[int]) -> VectorFeatures:
    """[B, layers, L, D] -> the first token of some layers."""
    return VectorFeatures(q[:, layers, 0].transpose(0, 1), p[:, layers, 0].transpose(0, 1))


def teacher_features(arrays: dict[str, Tensor], kind: str, layers: list[int]) -> tuple[Features, Features]:
    if kind == "ce":
        return ScoreFeatures(arrays["teacher_te"][None]), ScoreFeatures(arrays["teacher_ts"][layers])
    q, p = arrays["teacher_tq"], arrays["teacher_td"]
    final = arrays["teacher_te_q"][None], arrays["teacher_te_d"][None]
    if kind == "de":
        return VectorFeatures(*final), cls_vectors(q, p, layers)
    masks = torch.ones(q.shape[0], q.shape[2]), arrays["passage_mask"]
    return (
        TokenFeatures(final[0], masks[0], final[1], masks[1]),
        TokenFeatures(q[:, layers].transpose(0, 1), masks[0], p[:, layers].transpose(0, 1), masks[1]),
    )


@pytest.mark.parametrize("name", FILES)
def test_golden(name: str) -> None:
    path = SHARED / "golden" / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    with np.load(path) as file:
        meta = json.loads(str(file["meta"]))
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
    leaves = {key: arrays[key.removeprefix("grad_")].requires_grad_() for key in arrays if key.startswith("grad_")}
    kind, group, layers = meta["kind"], meta["passages_per_query"], meta["selected_student"]

    student = VectorFeatures(arrays["student_query"][None], arrays["student_passage"][None])
    student_layers = cls_vectors(arrays["student_query_layers"], arrays["student_passage_layers"], layers)
    teacher, teacher_layers = teacher_features(arrays, kind, meta["selected_teacher"])

    attention = "loss_de_db_attention" in meta["parts"]
    pairs = meta["selected_teacher"], meta["selected_student"]

    def taps(of: str, lengths: str, layers: list[int]) -> dict[int, Tap] | None:
        return {k: Tap.of(arrays[of][:, k], arrays[lengths]) for k in layers} if attention else None

    views = Views(
        Side(
            student,
            student_layers,
            taps("student_query_layers", "query_length", pairs[1]),
            taps("student_passage_layers", "passage_length", pairs[1]),
        ),
        Side(
            teacher,
            teacher_layers,
            taps("teacher_tq", "query_length", pairs[0]),
            taps("teacher_td", "passage_length", pairs[0]),
        ),
        Scope(group),
        cotrained=meta["train_teacher"],
    )
    losses = losses_section().model_validate(
        {
            "contrastive": {"temperature": 1.0, "scope": "group" if kind == "ce" else "batch"},
            "response": {"teacher_temperature": meta["temperature"]},
            "layer": {
                "teacher_temperature": meta["temperature"],
                "layer_temperature": meta["layer_temperature"],
                "reweight": meta["reweight"],
            },
            "attention": {"weight": float(attention), "form": "interaction", "divergence": "mse"},
        }
    )
    objective = Objective(losses, LossShape(ModelFacts("dual_encoder", 6), ModelFacts(kind, 12)))
    output = objective([views], objective.asked([{"layer": pairs, "attention": pairs}]))
    output.loss.backward()

    def close(value: Tensor | float, expected: Tensor | float, what: str) -> None:
        expected = torch.as_tensor(expected)
        error = (torch.as_tensor(value).detach() - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, f"{what}: relative error {error:.1e}"

    parts = meta["parts"]
    close(output.loss, meta["loss"], "loss")
    close(output.parts["contrastive"], parts["loss_db"], "L_stu")
    close(output.parts["response"], parts[f"loss_{kind}_db_dis"], "L_rep")
    close(output.parts["layer"], parts[f"loss_{kind}_db_layer_dis"], "L_lyr")
    for k, value in enumerate(output.layers["layers"]["kl"]):
        close(value, parts[f"loss_score_layer_dis_{k}"], f"layer pair {k}")
    if meta["train_teacher"]:
        close(output.parts["teacher_contrastive"], parts["loss_dual"], "L_tch")
        close(output.parts["response_reverse"], parts[f"loss_db_{kind}_dis"], "reverse L_rep")
    if attention:
        close(output.parts["attention"], parts["loss_de_db_attention"], "attention")
    assert leaves
    for key, leaf in leaves.items():
        assert leaf.grad is not None
        close(leaf.grad, arrays[key], key)
