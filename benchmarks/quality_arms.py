"""The arms of the quality benchmark: one configuration each, alike but for what an arm is about.

Every student is trained on the same groups in the same order for as many steps. It is minilm-l3, or three layers cut
out of the dual encoder that teaches it; see `quality.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

STUDENT = {
    "kind": "dual_encoder",
    "pooling": "mean",
    "normalize": True,
    "query_length": 32,
    "passage_length": 64,
}
TEACHERS: dict[str, dict[str, Any]] = {
    "ce": {"kind": "cross_encoder", "max_length": 144},
    "de": {
        "kind": "dual_encoder",
        "pooling": "cls",
        "normalize": True,
        "query_prompt": "Represent this sentence for searching relevant passages: ",
        "query_length": 48,
        "passage_length": 64,
    },
    "mp": {"kind": "dual_encoder", "pooling": "mean", "normalize": True, "query_length": 32, "passage_length": 64},
    "cb": {"kind": "colbert", "query_length": 32, "passage_length": 64},
}
# Every fourth layer of the dual encoder: a student that was never trained as a model of three layers, as users begin one.
CUT = (3, 7, 11)
CUT_LR = 2e-4
# Its last three layers, where a dual encoder forms its vector; the steps begin nearer to the teacher, and may be larger.
UPPER = (9, 10, 11)
UPPER_LR = 5e-4
VECTORS = {"weight": 50.0, "into": "same"}  # chosen on dev queries, of 5, 15 and 50
TUNED_LR = 2e-4  # chosen, as the weights beside it, on dev queries
DE_LAYERS = "3,6,7,8,9,10,11"  # whose vectors are kept: the upper half, and what `skip` takes
# A unit-length model's relevance lies in [-1, 1]: 1/20 makes of it what a cross-encoder's logits are.
COSINE_TEMPERATURE = 0.05
TEACHER_TEMPERATURE = {"ce": 3.0, "de": COSINE_TEMPERATURE, "mp": COSINE_TEMPERATURE, "cb": 1.0}
LENS_TEMPERATURE = 1.0  # that the cross-encoder's lens is fitted at, and read at
MODELS = {"student": "minilm-l3", "ce": "reranker-l12", "de": "bge-small", "mp": "mpnet-base"}


@dataclass(frozen=True)
class Arm:
    """One way to train the student. teacher: ce, de, mp, cb or none; losses: overrides of the losses' sections.

    source: what a teacher is read from. relevance: what `lead-ds teach` wrote of a query's own passages. vectors: of
    every text, so that all passages of the batch are compared. model: the model itself, where a dual encoder compares
    the same, and `cotrain` trains it along (without dropout, as the student). cut: the dual encoder's layers that are
    the student, which learns at CUT_LR. dims: widths that it is trained in. lr: another than the others'. second: a
    further teacher, and the losses that it feeds. beside: the arm that it is held against, where that is not response KL of
    its teacher.
    """

    name: str
    about: str
    teacher: str | None = "ce"
    losses: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    lens: bool = False
    source: Literal["relevance", "vectors", "model"] = "relevance"
    cotrain: bool = False
    cut: tuple[int, ...] = ()
    dims: tuple[int, ...] = ()
    lr: float | None = None
    second: tuple[str, tuple[str, ...]] | None = None
    beside: str | None = None


def _layer(**settings: Any) -> dict[str, dict[str, Any]]:
    counted = {} if settings.get("select") == "given" else {"k": 3}
    return {"layer": {"weight": 1.0, "select": "last", **counted, "layer_temperature": 1.0, **settings}}


def _lens(**settings: Any) -> dict[str, dict[str, Any]]:
    return _layer(teacher_temperature=LENS_TEMPERATURE, **settings)


ARMS = [
    Arm("labels", "labels only", None),
    Arm("response", "labels + response KL"),
    Arm("margin", "labels + margin-MSE", losses={"response": {"weight": 0.0}, "margin_mse": {"weight": 1.0}}),
    Arm("lead", "LEAD: + layer KL, last 3 layers, own head", losses=_layer()),
    Arm("lead-lens", "LEAD, last 3 layers, tuned lens", losses=_lens(), lens=True),
    Arm("lead-informative", "LEAD, informative layers, tuned lens", losses=_lens(select="informative"), lens=True),
    Arm("lead-random", "LEAD, random layers, own head", losses=_layer(select="random")),
    Arm("lead-random-lens", "LEAD, random layers, tuned lens", losses=_lens(select="random"), lens=True),
    Arm("lead-skip", "LEAD, skip layers, own head", losses=_layer(select="skip")),
    Arm(
        "lead-random-0.1",
        "LEAD, random layers, layer temperature 0.1",
        losses=_layer(select="random", layer_temperature=0.1),
    ),
    Arm(
        "lead-random-10",
        "LEAD, random layers, layer temperature 10",
        losses=_layer(select="random", layer_temperature=10.0),
    ),
    Arm("lead-plain", "LEAD without re-weighting, last 3 layers", losses=_layer(reweight=False)),
    Arm("response-de", "labels + response KL, dual-encoder teacher", "de", source="vectors"),
    Arm("lead-de", "LEAD, last 3 layers, dual-encoder teacher", "de", losses=_layer(), source="vectors"),
    Arm(
        "lead-de-attention",
        "the same + attention KL",
        "de",
        losses={**_layer(), "attention": {"weight": 1.0, "select": "last", "k": 1}},
        source="model",
    ),
    Arm(
        "response-de-tuned",
        "dual-encoder teacher, tuned: labels + response KL, weight 3",
        "de",
        losses={"response": {"weight": 3.0}},
        source="vectors",
        lr=TUNED_LR,
    ),
    Arm(
        "lead-de-tuned",
        "dual-encoder teacher, tuned: the same + layer 10 to layer 1, weight 1",
        "de",
        losses={
            "response": {"weight": 3.0},
            **_layer(select="given", teacher_layers=[10], student_layers=[1]),
        },
        source="vectors",
        lr=TUNED_LR,
        beside="response-de-tuned",
    ),
    Arm("labels-cut", "cut student: labels only", None, cut=CUT),
    Arm("response-cut", "cut student: labels + response KL, dual-encoder teacher", "de", source="vectors", cut=CUT),
    Arm(
        "lead-cut",
        "cut student: LEAD, skip layers, dual-encoder teacher",
        "de",
        losses=_layer(select="skip"),
        source="vectors",
        cut=CUT,
    ),
    Arm(
        "upper",
        "the teacher's last three layers: labels + response KL, weight 3",
        "de",
        losses={"response": {"weight": 3.0}},
        source="vectors",
        cut=UPPER,
        lr=UPPER_LR,
    ),
    Arm(
        "upper-aligned",
        "the same + vectors, weight 50",
        "de",
        losses={"response": {"weight": 3.0}, "embedding": VECTORS},
        source="vectors",
        cut=UPPER,
        lr=UPPER_LR,
        beside="upper",
    ),
    Arm(
        "lead-upper",
        "the same + LEAD: the teacher's layers 9 and 10 to those that were cut out of it, weight 1",
        "de",
        losses={
            "response": {"weight": 3.0},
            "embedding": VECTORS,
            **_layer(select="given", teacher_layers=[9, 10], student_layers=[0, 1]),
        },
        source="vectors",
        cut=UPPER,
        lr=UPPER_LR,
        beside="upper-aligned",
    ),
    Arm(
        "upper-widths",
        "the last three layers, ranking and vectors, in two widths of the teacher's main directions",
        "de",
        losses={
            "response": {"weight": 3.0},
            "embedding": {**VECTORS, "into": "pca", "keep": True, "start": "orthogonal"},
        },
        source="vectors",
        cut=UPPER,
        lr=UPPER_LR,
        beside="upper-aligned",
        dims=(128, 384),
    ),
    Arm(
        "upper-two",
        "the last three layers, ranking by two teachers, vectors of the one that they were cut out of",
        "de",
        losses={"response": {"weight": 3.0}, "embedding": VECTORS},
        source="vectors",
        cut=UPPER,
        lr=UPPER_LR,
        second=("mp", ("response",)),
        beside="upper-aligned",
    ),
    Arm(
        "upper-both",
        "the same, and vectors of both, side by side, in their main directions",
        "de",
        losses={"response": {"weight": 3.0}, "embedding": {**VECTORS, "into": "pca", "keep": True}},
        source="vectors",
        cut=UPPER,
        lr=UPPER_LR,
        second=("mp", ("response", "embedding")),
        beside="upper-aligned",
    ),
    Arm(
        "upper-mpnet",
        "the last three layers, ranking and vectors of the second teacher alone, through a linear map",
        "mp",
        losses={"response": {"weight": 3.0}, "embedding": {**VECTORS, "into": "teacher"}},
        source="vectors",
        cut=UPPER,
        lr=UPPER_LR,
        beside="upper-two",
    ),
    Arm(
        "aligned",
        "minilm-l3: labels + response KL, weight 3, + vectors, weight 50",
        "de",
        losses={"response": {"weight": 3.0}, "embedding": VECTORS},
        source="vectors",
        lr=UPPER_LR,
        beside="response-de-tuned",
    ),
    Arm("response-cb", "labels + response KL, ColBERT teacher", "cb"),
    Arm("lead-cb", "LEAD, last 3 layers, ColBERT teacher", "cb", losses=_layer()),
    Arm(
        "response-de-cotrained",
        "labels + response KL, co-trained dual-encoder teacher",
        "de",
        source="model",
        cotrain=True,
    ),
    Arm(
        "lead-de-cotrained",
        "LEAD, last 3 layers, co-trained dual-encoder teacher",
        "de",
        losses=_layer(),
        source="model",
        cotrain=True,
    ),
]
BY_NAME = {arm.name: arm for arm in ARMS}


def settings(
    arm: Arm, work: Path, models: Mapping[str, Path], *, negatives: int, steps: int, batch: int, lr: float, seed: int
) -> dict[str, Any]:
    """The configuration of a run: a tree for `Config`. negatives: of each query, as many as `build` mined."""
    temperature = TEACHER_TEMPERATURE[arm.teacher or "ce"]
    student_temperature = COSINE_TEMPERATURE
    tree: dict[str, Any] = {
        "seed": seed,
        "student": {**STUDENT, "path": str(models["cut" if arm.cut else "student"]), **cut_of(arm)},
        "data": {"path": str(work / "train"), "negatives": negatives},
        "losses": {
            "contrastive": {"weight": 1.0, "temperature": student_temperature},
            "response": {
                "weight": 0.0 if arm.teacher is None else 1.0,
                "teacher_temperature": temperature,
                "student_temperature": student_temperature,
            },
            # The student's margins in a cross-encoder's units: (20 cos - logit)^2, over 400 as the student sees it.
            "margin_mse": {"weight": 0.0, "teacher_scale": student_temperature},
            "layer": {"weight": 0.0, "teacher_temperature": temperature, "student_temperature": student_temperature},
        },
        "train": {
            "steps": steps,
            "batch_size": batch,
            "lr": arm.lr or (CUT_LR if arm.cut else lr),
            "evaluate_every": 0,
            "save_every": steps,
            "log_every": 10,
        },
        "evaluation": {"split": None},
        "monitor": {"tensorboard": False, "csv": False},
        "output": str(work / "runs" / f"{arm.name}-{seed}"),
    }
    if arm.second is not None:
        name, fed = arm.second
        first = {**teacher_section(arm, work, models), "losses": ["response", "embedding"]}
        tree["mix"] = {"vectors": "concatenate"} if "embedding" in fed else {}
        tree["teachers"] = [first, {**teacher_section(replace(arm, teacher=name), work, models), "losses": list(fed)}]
    elif arm.teacher is not None:
        tree["teacher"] = teacher_section(arm, work, models)
    for name, changed in arm.losses.items():
        tree["losses"][name] = {**tree["losses"].get(name, {}), **changed}
    return tree


def cut_of(arm: Arm) -> dict[str, Any]:
    """What of the student's section says that it is cut out of the dual encoder, and its widths."""
    cut = {"layers": list(arm.cut), "pooling": "cls"} if arm.cut else {}
    return {**cut, **({"dims": list(arm.dims)} if arm.dims else {})}


def teacher_section(arm: Arm, work: Path, models: Mapping[str, Path]) -> dict[str, Any]:
    """Where an arm's teacher is read from."""
    assert arm.teacher is not None
    if arm.source != "model":
        return {"kind": "cached", "path": str(cache_of(arm, work))}
    assert not arm.cotrain or arm.teacher == "de", "only the dual encoder is there without dropout"
    path = models["cut" if arm.cotrain else arm.teacher]  # `cut` is the dual encoder without dropout
    dtype = "auto" if arm.cotrain else "bf16"  # one that is trained has the student's
    return {**TEACHERS[arm.teacher], "path": str(path), "dtype": dtype, "train": arm.cotrain}


def cache_of(arm: Arm, work: Path) -> Path:
    """The folder of an arm's teacher's output for the training groups."""
    if arm.source == "vectors":
        return work / f"vectors-{arm.teacher}"
    return work / f"cache-{arm.teacher}{'-lens' if arm.lens else ''}"
