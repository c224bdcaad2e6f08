"""Layer selection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from lead_ds.errors import InputError
from lead_ds.losses import Attention, Depths, Layer, Loss, informative_layers


def select_layers(
    settings: Any,
    teacher: int,
    student: int,
    *,
    seed: int,
    step: int,
    informative: Sequence[int] = (),
    of: type[Loss] = Layer,
) -> tuple[list[int], list[int]]:
    return of.pair(settings, Depths(teacher, student, seed, informative), step)


def test_random_is_stateless_sorted_and_without_replacement() -> None:
    config = Layer.set(k=4, every=10)
    draws = [select_layers(config, 12, 6, seed=1, step=step) for step in range(100)]
    for step, (teacher, student) in enumerate(draws):
        assert (teacher, student) == draws[step - step % 10]
        assert teacher == sorted(set(teacher))
        assert student == sorted(set(student))
        assert len(teacher) == len(student) == 4
        assert 0 <= teacher[0] <= teacher[-1] < 12
        assert 0 <= student[0] <= student[-1] < 6
    assert len({tuple(teacher) for teacher, _ in draws}) > 5
    assert {layer for teacher, _ in draws for layer in teacher} == set(range(12))
    assert select_layers(config, 12, 6, seed=1, step=95) == draws[95]
    assert [select_layers(config, 12, 6, seed=2, step=step) for step in range(100)] != draws


def test_random_is_the_same_on_every_machine() -> None:
    # A changed draw would make a resumed run compare other layers than it did.
    assert select_layers(Layer.set(k=3), 12, 6, seed=888, step=0) == ([0, 5, 8], [0, 3, 4])


def test_random_of_all_layers_is_all_layers() -> None:
    assert select_layers(Layer.set(k=6), 6, 6, seed=0, step=0) == (list(range(6)), list(range(6)))


def test_last() -> None:
    assert select_layers(Layer.set(select="last", k=3), 12, 6, seed=0, step=5) == ([9, 10, 11], [3, 4, 5])


def test_skip_is_evenly_spaced_and_ends_with_the_last() -> None:
    assert select_layers(Layer.set(select="skip", k=3), 12, 6, seed=0, step=5) == ([3, 7, 11], [1, 3, 5])
    assert select_layers(Layer.set(select="skip", k=6), 12, 6, seed=0, step=0) == ([1, 3, 5, 7, 9, 11], list(range(6)))
    assert select_layers(Layer.set(select="skip", k=5), 12, 5, seed=0, step=0) == ([1, 3, 6, 8, 11], list(range(5)))


def test_given_keeps_its_pairs() -> None:
    config = Layer.set(select="given", teacher_layers=[11, 5], student_layers=[2, 2])
    assert select_layers(config, 12, 6, seed=0, step=0) == ([11, 5], [2, 2])


def test_too_many_layers_name_both_models() -> None:
    with pytest.raises(InputError, match=r"losses\.layer\.k: 5 layers .*teacher has 12, the student 3 \(use at most 3"):
        select_layers(Layer.set(k=5), 12, 3, seed=0, step=0)
    with pytest.raises(InputError, match=r"losses\.attention\.k: 5 .*teacher has 4, the student 6"):
        select_layers(Attention.set(k=5), 4, 6, seed=0, step=0, of=Attention)


def test_given_beyond_the_model() -> None:
    config = Layer.set(select="given", teacher_layers=[1], student_layers=[6])
    with pytest.raises(InputError, match=r"student_layers: layer 6 is beyond the student's 6 layers"):
        select_layers(config, 12, 6, seed=0, step=0)


def test_informative_layers_beat_chance_by_the_margin() -> None:
    assert informative_layers([1.4, 1.29, 1.2, 0.5], chance=1.4, margin=0.1) == [1, 2, 3]
    assert informative_layers([1.4, 1.41], chance=1.4, margin=0.1) == []


def test_informative_draws_from_those_layers_alone() -> None:
    config = Layer.set(select="informative", k=2, every=5)
    draws = [select_layers(config, 12, 6, seed=1, step=step, informative=[3, 7, 8, 11]) for step in range(100)]
    assert {layer for teacher, _ in draws for layer in teacher} == {3, 7, 8, 11}
    assert {layer for _, student in draws for layer in student} == set(range(6))
    for step, (teacher, student) in enumerate(draws):
        assert (teacher, student) == draws[step - step % 5]
        assert teacher == sorted(set(teacher))
        assert len(teacher) == len(student) == 2
    with pytest.raises(InputError, match=r"losses\.layer\.k: 2 layers .* 1 of the teacher's are informative"):
        select_layers(config, 12, 6, seed=1, step=0, informative=[3])
