"""A setting that its kind, or its mode, ignores is refused with what to set instead: every pair, from the registries."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import ValidationError

from lead_ds.config import Config, StudentConfig, TeacherConfig
from lead_ds.errors import InputError
from lead_ds.losses import LOSSES
from lead_ds.models.kinds.kind import KINDS
from lead_ds.settings.base import Section
from lead_ds.settings.parse import parse_section
from lead_ds.settings.roles import WidthConfig
from lead_ds.settings.typed import is_section, kinds_of
from lead_ds.teachers.open import TEACHERS

ROLES = {"teacher": TeacherConfig, "student": StudentConfig}
REQUIRED = {"path": "x", "url": "http://host/rerank", "api": "tei"}
VALUES: dict[str, Any] = {
    "width": WidthConfig(hidden=3),
    "template": "{query} {passage}",
    "path": "z",
    "offload": "cpu",
    "url": "http://other/rerank",
}


def pairs() -> Iterator[tuple[str, str, str]]:
    """Every role, kind and setting of any kind."""
    for role, section in ROLES.items():
        for kind in section.kinds():
            for name in sorted(section.known_fields()):
                yield role, kind, name


def other_value(field: Any) -> Any:
    """A valid value of a field that is not its default."""
    for kind in kinds_of(field.annotation):
        for value in {bool: (True, False), int: (3,), float: (0.3,), str: ("other",)}.get(kind, ()):
            if value != field.default and not (kind is int and bool in kinds_of(field.annotation)):
                return value
        if get_origin(kind) is Literal:
            return next(value for value in get_args(kind) if value != field.default)
        if get_origin(kind) is list:
            return [0, 1]
        if get_origin(kind) is dict:
            return {"other": 1}
    raise AssertionError(field)


def run_with(role: str, kind: str, **settings: Any) -> dict[str, Any]:
    """A tree whose other role is of a kind that goes with any."""
    needed = {name: x for name, x in REQUIRED.items() if name in ROLES[role].of(kind).model_fields}
    section = {"kind": kind, **needed, **settings}
    other = {"kind": "dual_encoder", "path": "y"}
    tree = {"data": {"path": "d"}, "teacher": other, "student": other, role: section}
    given = kind not in TEACHERS or "layers" in TEACHERS[kind].gives
    return tree if given else {**tree, "losses": {"layer": {"weight": 0}}}


def parsed(tree: dict[str, Any]) -> tuple[Config | None, InputError | None]:
    """The configuration of a tree, or what it is refused for."""
    try:
        return parse_section(Config, tree, "x.yaml"), None
    except InputError as error:
        return None, error


@pytest.mark.parametrize(("role", "kind", "name"), list(pairs()))
def test_a_setting_is_read_or_refused(role: str, kind: str, name: str) -> None:
    section = ROLES[role].of(kind)
    own = name in section.model_fields
    field = ROLES[role].known_fields()[name]
    if name == "kind":
        return
    value = VALUES.get(name) or other_value(field)
    tree = run_with(role, kind, **{name: value})
    config, refused = parsed(tree)
    if not own:
        assert refused is not None, f"{role}.{name} of a {kind} was accepted, and ignored"
        assert refused.where == f"x.yaml: {role}.{name}"
        assert f"is ignored by kind: {kind}" in refused.what
        readers = [other for other, form in ROLES[role].kinds().items() if name in form.model_fields]
        assert any(reader in refused.remedy for reader in readers)
    elif refused is not None:  # by a rule that binds it to another setting
        assert "is ignored by kind" not in refused.what
    else:
        assert getattr(getattr(config, role), name) == value


@pytest.mark.parametrize(("role", "kind", "name"), [pair for pair in pairs() if pair[2] not in ("kind", *REQUIRED)])
def test_at_its_default_it_says_nothing(role: str, kind: str, name: str) -> None:
    """As earlier versions wrote a run's settings: those of all kinds."""
    default = ROLES[role].known_fields()[name].default
    config = parse_section(Config, run_with(role, kind, **{name: default}), "x.yaml")
    assert (name in getattr(config, role).model_dump()) == (name in ROLES[role].of(kind).model_fields)


def forms() -> Iterator[tuple[str, str, str, type[Section]]]:
    """Every loss that has several forms, the key that names them, and each form."""
    for loss in LOSSES:
        sections = [kind for kind in kinds_of(LOSSES[loss].Settings) if is_section(kind)]
        if len(sections) > 1:
            shared = set.intersection(*(set(section.model_fields) for section in sections))
            [key] = [
                name
                for name in shared
                if all(len(get_args(s.model_fields[name].annotation)) == 1 for s in sections)
                and all(get_origin(s.model_fields[name].annotation) is Literal for s in sections)
            ]
            for section in sections:
                yield loss, key, get_args(section.model_fields[key].annotation)[0], section


def modes() -> Iterator[tuple[str, str, str, str, Any]]:
    """Every loss, key, mode and setting of another mode, with a value."""
    found = list(forms())
    for loss, key, mode, section in found:
        others = {name: field for one, _, _, form in found if one == loss for name, field in form.model_fields.items()}
        for name, field in others.items():
            if name not in section.model_fields:
                yield loss, key, mode, name, other_value(field)


@pytest.mark.parametrize(("loss", "key", "mode", "name", "value"), list(modes()))
def test_a_setting_of_another_mode_is_refused(loss: str, key: str, mode: str, name: str, value: Any) -> None:
    given = {"select": "given", "teacher_layers": [1], "student_layers": [0]}
    settings = {**{k: v for k, v in given.items() if mode == "given"}, key: mode, name: value}
    tree = {**run_with("teacher", "dual_encoder"), "losses": {loss: settings}}
    with pytest.raises(InputError) as caught:
        parse_section(Config, tree, "x.yaml")
    assert caught.value.where.endswith(f"losses.{loss}.{name}")
    assert f"is ignored by {key}: {mode}" in str(caught.value)


def test_there_are_pairs_and_modes() -> None:
    assert len(set(KINDS)) >= 4
    assert "cached" in TEACHERS
    assert len(list(pairs())) > 100
    assert len(list(modes())) > 10


@pytest.mark.parametrize(
    ("section", "place", "says"),
    [
        ({"path": "x"}, "teacher.kind", "is required (add one of"),
        ({"kind": "dual_encodr", "path": "x"}, "teacher.kind", "did you mean 'dual_encoder'?"),
        (
            {"kind": "colbert", "path": "x", "max_length": 9},
            "teacher.max_length",
            "set query_length and passage_length",
        ),
        ({"kind": "cross_encoder", "path": "x", "query_length": 9}, "teacher.query_length", "set max_length"),
        ({"kind": "cross_encoder", "path": "x", "query_lenght": 9}, "teacher.query_lenght", "did you mean"),
        ({"kind": "cross_encoder"}, "teacher.path", "is required"),
        ("cross_encoder", "teacher.kind", "is not a section"),
    ],
)
def test_mistakes_in_a_model_are_told_with_their_place(section: Any, place: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_section(Config, {**run_with("student", "dual_encoder"), "teacher": section}, "x.yaml")
    assert caught.value.where == f"x.yaml: {place}"
    assert says in str(caught.value)


def test_a_kind_that_cannot_be_a_student_is_refused() -> None:
    with pytest.raises(InputError, match=r"student\.kind: 'llm_reranker' cannot be one here"):
        parse_section(Config, {**run_with("student", "colbert"), "student": {"kind": "llm_reranker"}}, "x.yaml")


def test_a_cache_takes_the_settings_of_the_model_that_it_was_made_of() -> None:
    settings = {"kind": "cached", "path": "c", "max_length": 64, "yes_token": "y", "placement": "zero3"}
    teacher = TeacherConfig.model_validate(settings)
    assert (teacher.max_length, teacher.yes_token) == (64, "y")
    with pytest.raises(ValidationError, match="cannot be trained"):
        TeacherConfig(kind="cached", path="c", train=True)


def test_sections_are_called_validated_copied_and_pickled_as_those_of_their_kind() -> None:
    made = TeacherConfig(kind="llm_reranker", path="x", yes_token="y")
    assert isinstance(made, TeacherConfig)
    assert isinstance(made, KINDS["llm_reranker"].Settings)
    assert made == TeacherConfig.model_validate({"kind": "llm_reranker", "path": "x", "yes_token": "y"})
    assert type(made.model_copy(update={"max_length": 3})) is type(made)
    assert pickle.loads(pickle.dumps(made)) == made
    assert StudentConfig(path="x").kind == "dual_encoder"
    assert Config.model_validate(Config.model_validate(run_with("teacher", "cached")).model_dump()).teacher is not None
