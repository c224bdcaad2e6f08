"""Every rule that binds several sections is broken once: the key to change, what is wrong, and what to do are said."""

from __future__ import annotations

from typing import Any

import pytest

from lead_ds.config.load import parse_config
from lead_ds.config.rules import RULES
from lead_ds.errors import InputError

PAIRS = {"student": {"path": "-", "kind": "cross_encoder"}, "teacher": {"path": "-", "kind": "cross_encoder"}}
# By rule: what breaks it, the key that it names, what it says of it, and the change that mends it.
CASES: dict[str, tuple[dict[str, Any], str, str, dict[str, Any]]] = {
    "losses_have_a_teacher": (
        {"teacher": None},
        "teacher",
        "a teacher section is missing: response of losses",
        {"losses": {"response": {"weight": 0}}},
    ),
    "queries_alone_have_an_index": (
        {"student": {"passages": "teacher"}, "evaluation": {"split": "dev"}},
        "evaluation.split",
        "would search an index of the student's own",
        {"evaluation": {"split": None}},
    ),
    "templates_are_of_frozen_models": (
        {"student": {"kind": "cross_encoder", "template": "pair"}},
        "student.template",
        "is read by a frozen model alone",
        {"student": {"template": None}},
    ),
    "labels_have_something_to_compare": (
        {"losses": {"contrastive": {"weight": 1, "scope": "group"}}, "data": {"negatives": 0}},
        "data.negatives",
        "is 0",
        {"data": {"negatives": 1}},
    ),
    "pairs_have_something_to_compare": (
        {**PAIRS, "data": {"negatives": 0}, "losses": {"contrastive": {"weight": 0}}},
        "data.negatives",
        "is 0: a model that reads pairs is compared over a query's own passages",
        {"data": {"negatives": 1}},
    ),
    "scope_is_one_that_pairs_have": (
        {**PAIRS, "train": {"in_batch": "local"}},
        "train.in_batch",
        "local is ignored by a cross_encoder",
        {"train": {"in_batch": "global"}},
    ),
    "packed_rows_are_passes": (
        {"train": {"grad_cache": 2}, "student": {"passes": "packed"}},
        "student.passes",
        "packed: train.grad_cache makes passes of its own",
        {"student": {"passes": None}},
    ),
    "maps_come_whole": (
        {"losses": {"attention": {"weight": 1}}, "student": {"passes": 2}},
        "student.passes",
        "has no attention maps",
        {"losses": {"attention": {"weight": 0}}},
    ),
    "informative_layers_stay_so": (
        {"teacher": {"train": True}, "losses": {"layer": {"weight": 1, "select": "informative"}}},
        "teacher.train",
        "informative layers, which are measured once",
        {"teacher": {"train": False}},
    ),
    "a_lens_has_one_state_to_read": (
        {"teacher": {"kind": "colbert", "lens": "tuned"}},
        "teacher.lens",
        "a tuned lens reads one state per text, a colbert has one per token",
        {"teacher": {"lens": "head"}},
    ),
    "a_lens_path_names_a_lens": (
        {"teacher": {"lens_path": "lens"}},
        "teacher.lens_path",
        "is ignored by lens: head",
        {"teacher": {"lens": "tuned"}, "losses": {"layer": {"weight": 1}}},
    ),
    "a_lens_has_layers_to_read": (
        {"teacher": {"lens": "tuned"}},
        "teacher.lens",
        "tuned is ignored: no loss that it feeds reads layers",
        {"losses": {"embedding": {"weight": 1, "teacher_layers": [0], "student_layers": [0]}}},
    ),
    "sharding_is_of_a_sharded_teacher": (
        {"teacher": {"placement": "replicate"}, "deepspeed": {"teacher": "mine.json"}},
        "deepspeed.teacher",
        "is ignored: no frozen teacher of this run can be sharded",
        {"teacher": {"placement": "auto"}},
    ),
    "teacher_gives_what_losses_read": (
        {"losses": {"layer": {"weight": 1}}, "teacher": {"kind": "scores", "path": None}},
        "losses.layer.weight",
        "a teacher of kind scores has no layers to read",
        {"losses": {"layer": {"weight": 0}}},
    ),
    "several_teachers_share": (
        {"teacher": None, "teachers": [{"kind": "scores", "losses": ["contrastive"]}]},
        "teachers.0.losses",
        "names contrastive, which is no loss with a weight that reads a teacher",
        {"teachers": [{"kind": "scores", "losses": ["response"]}]},
    ),
    "mixtures_are_of_several": (
        {"mix": {"relevance": "nll"}},
        "mix.relevance",
        "nll is ignored: no loss of final relevance is fed by several teachers",
        {"mix": {"relevance": "weight"}},
    ),
    "overlap_has_a_teacher_to_run_ahead": (
        {"teacher": {"train": True}, "train": {"overlap": True}},
        "train.overlap",
        "there is no frozen teacher that could run ahead",
        {"train": {"overlap": False}},
    ),
    "patience_has_evaluations": (
        {"train": {"patience": 2}, "evaluation": {"split": None}},
        "train.patience",
        "is never lost: evaluation.split is null",
        {"train": {"patience": 0}},
    ),
    "candidates_are_reranked": (
        {"evaluation": {"depth": 7}},
        "evaluation.depth",
        "is ignored by a dual_encoder, which searches the whole corpus",
        {"student": {"kind": "cross_encoder"}},
    ),
    "a_students_scale_is_of_its_layers": (
        {"student": {"scale": "cosine"}, "losses": {"layer": {"weight": 0}}},
        "student.scale",
        "cosine is ignored: no loss reads its layers",
        {"student": {"scale": "none"}},
    ),
    "one_engine_has_one_dtype": (
        {"teacher": {"train": True, "dtype": "bf16"}, "student": {"dtype": "fp32"}},
        "teacher.dtype",
        "has the student's dtype, which is fp32",
        {"student": {"dtype": "bf16"}},
    ),
    "teachers_come_and_go": (
        {"teacher": None, "teachers": [{"path": "-", "kind": "cross_encoder", "until": 9}], "train": {"steps": 5}},
        "teachers.0.until",
        "9 is beyond the run's last step, train.steps: 5",
        {"train": {"steps": 9}},
    ),
    "lora_is_of_the_student": (
        {"teacher": {"train": True}, "train": {"lora": {"r": 4}}},
        "train.lora",
        "the teacher that learns along would be trained whole",
        {"teacher": {"train": False}},
    ),
    "averages_have_checkpoints": (
        {"train": {"average": 4, "keep": 3, "save_every": 1}},
        "train.average",
        "4 checkpoints are to be averaged, 3 are kept",
        {"train": {"keep": 4, "save_every": 1}},
    ),
    "widths_are_of_vectors": (
        {"student": {"dims": [4, 8], "kind": "colbert"}},
        "student.dims",
        "is ignored by a colbert",
        {"student": {"kind": "dual_encoder"}},
    ),
    "first_dimensions_are_of_what_is_read": (
        {"student": {"dim": 8}},
        "student.dim",
        "for a model that is read as it is",
        {"student": {"dim": None}},
    ),
}


def tree(*changes: dict[str, Any]) -> dict[str, Any]:
    """A small run, with sections changed; a value of None takes a setting, or a section, out."""
    whole: dict[str, Any] = {
        "teacher": {"path": "-", "kind": "dual_encoder"},
        "student": {"path": "-", "kind": "dual_encoder"},
        "data": {"path": "-"},
        "losses": {"response": {"weight": 1}, "layer": {"weight": 0}, "contrastive": {"weight": 0}},
    }
    for change in changes:
        for name, section in change.items():
            if section is None:
                whole.pop(name, None)
                continue
            if isinstance(section, list):
                whole[name] = section
                continue
            merged = whole.setdefault(name, {})
            for key, value in section.items():
                if isinstance(value, dict):
                    value = {**merged.get(key, {}), **value}
                merged[key] = value
                if value is None and key == "path":
                    del merged[key]
    return whole


def test_every_rule_is_broken_here() -> None:
    assert {rule.__name__ for rule in RULES} == set(CASES)


@pytest.mark.parametrize("rule", CASES)
def test_a_broken_rule_names_the_setting_and_what_to_do(rule: str) -> None:
    change, key, what, mended = CASES[rule]
    with pytest.raises(InputError) as caught:
        parse_config(tree(change), "run.yaml")
    assert caught.value.where == f"run.yaml: {key}"
    assert what in caught.value.what
    assert caught.value.remedy
    parse_config(tree(change, mended), "run.yaml")


@pytest.mark.parametrize("every", [0, 100, 200])
def test_patience_that_no_evaluation_tries(every: int) -> None:
    split, train = {"evaluation": {"split": "dev"}}, {"steps": 100, "patience": 2}
    parse_config(tree(split, {"train": train | {"evaluate_every": 20}}), "run.yaml")
    with pytest.raises(InputError, match=f"train.patience: is never lost: .*evaluate_every is {every}"):
        parse_config(tree(split, {"train": train | {"evaluate_every": every}}), "run.yaml")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"student": {"kind": "colbert"}}, "student.passages"),
        ({"teacher": {"train": True}}, "student.passages"),
        ({"losses": {"response": {"weight": 0}}}, "student.passages"),
        ({"losses": {"layer": {"weight": 1}}}, "losses.layer.weight"),
        ({"losses": {"embedding": {"weight": 1, "of": ["queries", "positives"]}}}, "losses.embedding.of"),
        ({"losses": {"spread": {"weight": 1}}}, "losses.spread.of"),
    ],
)
def test_a_student_of_queries_alone(change: dict[str, Any], key: str) -> None:
    asking = {"student": {"passages": "teacher"}, "evaluation": {"split": None}}
    parse_config(tree(asking), "run.yaml")
    with pytest.raises(InputError) as caught:
        parse_config(tree(asking, change), "run.yaml")
    assert caught.value.where == f"run.yaml: {key}"
