"""Settings of a loss that its mode ignores are refused, every one, with what to set instead."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from lead_ds.config import load_config, losses_section
from lead_ds.config.load import parse_config
from lead_ds.errors import InputError
from lead_ds.losses import LOSSES
from lead_ds.losses.selection import WAYS
from lead_ds.settings.modes import Modes
from tests.helpers.launch import ROOT

BASE: dict[str, Any] = {
    "student": {"path": "-"},
    "data": {"path": "-"},
    "teacher": {"kind": "dual_encoder", "path": "-"},
}
SAMPLES: dict[str, Any] = {
    "k": 2,
    "every": 3,
    "informative_margin": 0.2,
    "teacher_layers": [1],
    "student_layers": [0],
}
RECIPE = ROOT / "ds_configs" / "recipes" / "lead_12de_to_6de.yaml"


def modes_of(loss: str) -> Modes | None:
    field = losses_section().model_fields[loss]
    return next((mark for mark in field.metadata if isinstance(mark, Modes)), None)


SELECTING = [loss for loss in LOSSES if (modes := modes_of(loss)) is not None and modes.key == "select"]
CASES = [
    (loss, mode, name)
    for loss in SELECTING
    for mode in modes_of(loss).sections  # type: ignore[union-attr]
    for name in {name for section in modes_of(loss).sections.values() for name in section.model_fields}  # type: ignore[union-attr]
]


def section_of(loss: str, mode: str, **values: Any) -> dict[str, Any]:
    needed = {"teacher_layers": [1], "student_layers": [0]} if mode == "given" else {}
    return {**BASE, "losses": {loss: {"select": mode, **needed, **values}}}


def test_every_loss_that_selects_layers_is_walked() -> None:
    assert set(SELECTING) == {"layer", "attention"}
    assert {mode for _, mode, _ in CASES} == set(WAYS)


@pytest.mark.parametrize(("loss", "mode", "name"), sorted(CASES))
def test_every_setting_of_every_mode(loss: str, mode: str, name: str) -> None:
    modes = modes_of(loss)
    assert modes is not None
    section = modes.sections[mode]
    if name in section.model_fields:
        default = section.model_fields[name].get_default(call_default_factory=True)
        value = mode if name == "select" else SAMPLES.get(name, default)
        found = getattr(parse_config(section_of(loss, mode, **{name: value}), "run.yaml").losses, loss)
        assert getattr(found, name) == value
        return
    for value in (
        SAMPLES[name],
        *(s.model_fields[name].default for s in modes.sections.values() if name in s.model_fields),
    ):
        if not isinstance(value, (int, float, list)):
            continue  # a setting that has no default
        with pytest.raises(InputError) as caught:
            parse_config(section_of(loss, mode, **{name: value}), "run.yaml")
        where, told = f"run.yaml: losses.{loss}.{name}", str(caught.value)
        assert told.startswith(f"{where}: is ignored by select: {mode} (")
        own = {"random": "every and k", "informative": "every, informative_margin and k"}.get(mode)
        assert own or mode in told
        readers = [way for way, other in modes.sections.items() if name in other.model_fields]
        assert all(reader in told for reader in readers)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"heads": "mean", "relation_heads": 2}, "relation_heads: is ignored by heads: mean"),
        ({"heads": "pair", "relation_heads": 2}, "relation_heads: is ignored by heads: pair"),
        ({"form": "interaction", "heads": "mean"}, "heads: mean does not go with form: interaction"),
        ({"divergence": "mse"}, "divergence: mse needs form: interaction"),
    ],
)
def test_attention_maps_of_another_form(values: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        parse_config({**BASE, "losses": {"attention": {"weight": 1.0, **values}}}, "run.yaml")


def test_given_layers_are_both_needed_and_equally_many() -> None:
    for values, told in (
        ({}, "teacher_layers: is needed by select: given .give teacher_layers and student_layers"),
        ({"teacher_layers": [1]}, "student_layers: is needed by select: given"),
        ({"teacher_layers": [1], "student_layers": [0, 1]}, "equally many"),
    ):
        with pytest.raises(InputError, match=told):
            parse_config({**BASE, "losses": {"layer": {"select": "given", **values}}}, "run.yaml")


def test_what_an_earlier_version_saved_is_read() -> None:
    """Every setting was written then, those that the mode ignored among them."""
    saved = {
        "weight": 1.0,
        "k": 5,
        "every": 10,
        "informative_margin": 0.1,
        "teacher_layers": None,
        "student_layers": None,
    }
    for mode in ("random", "last", "skip", "informative"):
        layer = parse_config({**BASE, "losses": {"layer": {**saved, "select": mode}}}, "config.yaml").losses.layer
        assert (layer.select, layer.k) == (mode, 5)
    given = {**saved, "select": "given", "teacher_layers": [1], "student_layers": [0]}
    assert parse_config({**BASE, "losses": {"layer": given}}, "config.yaml").losses.layer.teacher_layers == [1]


def test_what_is_saved_now_is_read_again() -> None:
    for mode in WAYS:
        config = parse_config(section_of("layer", mode), "run.yaml")
        assert parse_config(config.model_dump(mode="json"), "config.yaml") == config


def test_an_override_of_the_mode_forgets_what_the_file_says_for_another() -> None:
    layer = load_config(RECIPE, ["losses.layer.select=last"]).losses.layer
    assert (layer.select, layer.k, layer.layer_temperature) == ("last", 5, 10.0)
    with pytest.raises(InputError, match="every: is ignored by select: last"):
        load_config(RECIPE, ["losses.layer.select=last", "losses.layer.every=3"])
    with pytest.raises(InputError, match=r"losses\.layer\.teacher_layers: is ignored by select: random"):
        load_config(RECIPE, ["losses.layer.teacher_layers=[1]"])


def test_a_mode_that_is_none() -> None:
    for value in ("best", 3, None):
        with pytest.raises(ValidationError, match="cannot be"):
            losses_section().model_validate({"layer": {"select": value}})
