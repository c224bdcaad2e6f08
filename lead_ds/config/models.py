"""The sections `teacher` and `student`: what the role is set by, and what the kind that they name is set by.

Composed when they are read, so that a kind of another package is among them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_origin

from pydantic import PlainValidator, SerializeAsAny, create_model
from pydantic.fields import FieldInfo
from typing_extensions import Self

from lead_ds.settings.base import Section
from lead_ds.settings.model import ModelConfig
from lead_ds.settings.modes import refusal
from lead_ds.settings.roles import Share, StudentRole, TeacherRole


class _OfKind(ModelConfig):
    """A section that is called, or validated, as that of the kind it names, as `pathlib.Path` is that of the system."""

    usual: ClassVar[str | None] = None  # the kind of a section that names none

    def __new__(cls, **settings: Any) -> Self:
        """The section of the kind that is named."""
        return super().__new__(cls if cls.composed() else cls.of(settings.get("kind", cls.usual)))

    if TYPE_CHECKING:  # what the kind is set by

        def __getattr__(self, name: str) -> Any: ...

    def __reduce__(self) -> Any:
        """Composed classes have no place to be imported from: the role is, and knows them by kind."""
        role = next(base for base in type(self).__mro__ if base.__base__ is _OfKind)
        return _again, (role, self.kind, self.__getstate__())

    @classmethod
    def composed(cls) -> bool:
        """Whether this is the section of one kind."""
        return get_origin(cls.model_fields["kind"].annotation) is Literal

    @classmethod
    def kinds(cls) -> dict[str, type[Section]]:
        """The section of every kind that can have the role, by its name."""
        raise NotImplementedError

    @classmethod
    def of(cls, kind: Any) -> type[Any]:
        """The section of a kind. Raises pydantic's ValidationError where there is none of that name."""
        kinds = cls.kinds()
        if isinstance(kind, str) and kind in kinds:
            return kinds[kind]
        if kind is None:
            raise refusal(cls.__name__, "kind", kind, "is required", f"add one of {', '.join(kinds)}")
        near = difflib.get_close_matches(str(kind), kinds, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(kinds)}"
        raise refusal(cls.__name__, "kind", kind, f"{kind!r} cannot be one here", remedy)

    @classmethod
    def known_fields(cls) -> dict[str, FieldInfo]:
        """See `Section`: of one kind its own, of the role those of all kinds."""
        if cls.composed():
            return cls.model_fields
        return {name: field for section in cls.kinds().values() for name, field in section.model_fields.items()}

    @classmethod
    def model_validate(cls, obj: Any, **how: Any) -> Any:
        """The checked section of the kind that a dictionary names."""
        return super().model_validate(obj, **how) if cls.composed() else cls.read(obj)

    @classmethod
    def read(cls, value: Any) -> Any:
        """The checked section of the kind that `value` names. A setting that the kind ignores is refused, with what to set
        instead; at its default, as earlier versions wrote it, it has no effect and is left out."""
        if isinstance(value, Section):
            return value
        if not isinstance(value, Mapping):
            raise refusal(cls.__name__, "kind", value, "is not a section", "write it as {path: ..., kind: ...}")
        kinds = cls.kinds()
        kind = value.get("kind", cls.usual)
        section = cls.of(kind)
        ignored = {name: list(readers(kinds, name)) for name in value if name not in section.model_fields}
        given = dict(value)
        for name, by in ignored.items():
            if by and any(given[name] == kinds[other].model_fields[name].default for other in by):
                del given[name]
            elif by:
                *others, last = by
                instead = section.instead.get(name, "take it out")
                remedy = f"{instead}; it is read by {', '.join(others)}{' and ' if others else ''}{last}"
                raise refusal(cls.__name__, name, given[name], f"is ignored by kind: {kind}", remedy)
        return section.model_validate(given)


class TeacherConfig(_OfKind, TeacherRole):
    """The model to learn from, or what is kept of one. Frozen unless `train`."""

    @classmethod
    def kinds(cls) -> dict[str, type[Section]]:
        return _teachers(cls)


class OneTeacherConfig(_OfKind, Share, TeacherRole):
    """One of several teachers: its section, its weight and the losses that it feeds. Frozen."""

    @classmethod
    def kinds(cls) -> dict[str, type[Section]]:
        return _teachers(cls)


class StudentConfig(_OfKind, StudentRole):
    """The model to train."""

    usual: ClassVar[str | None] = "dual_encoder"

    @classmethod
    def kinds(cls) -> dict[str, type[Section]]:
        from lead_ds.models.kinds.kind import KINDS

        students = [name for name in KINDS if KINDS[name].can_be_student]
        return {name: _section(StudentConfig, name, KINDS[name].Settings) for name in students}


AnyTeacher = Annotated[SerializeAsAny[TeacherConfig], PlainValidator(TeacherConfig.read)]
OneTeacher = Annotated[SerializeAsAny[OneTeacherConfig], PlainValidator(OneTeacherConfig.read)]
AnyStudent = Annotated[SerializeAsAny[StudentConfig], PlainValidator(StudentConfig.read)]


def readers(kinds: Mapping[str, type[Section]], name: str) -> Iterator[str]:
    """The kinds that a setting is read by."""
    return (kind for kind, section in kinds.items() if name in section.model_fields)


@cache
def _section(role: type[Any], kind: str, settings: type[Section]) -> type[Any]:
    """The section of a kind in a role."""
    fields: dict[str, Any] = {"kind": (Literal[kind], kind if kind == role.usual else ...)}
    name = kind.title().replace("_", "") + role.__name__
    return create_model(name, __base__=(settings, role), __module__=__name__, __doc__=settings.__doc__, **fields)


def _teachers(role: Any) -> dict[str, type[Section]]:
    """The sections of a teacher's role: of models of every kind, and of teachers that are no models of this run."""
    from lead_ds.models.kinds.kind import KINDS
    from lead_ds.teachers.open import TEACHERS

    models = {name: KINDS[name].Settings for name in KINDS}
    return {
        **{name: _section(role, name, settings) for name, settings in models.items()},
        **{name: _given(role, name, TEACHERS[name].Settings, tuple(models.values())) for name in TEACHERS},
    }


@cache
def _given(role: type[Any], kind: str, settings: type[Section], models: tuple[type[Section], ...]) -> type[Any]:
    """The section of a teacher that is not a model of this run; where it stands for one, with the settings of every
    kind."""
    fields: dict[str, Any] = {"kind": (Literal[kind], ...)}
    if issubclass(settings, TeacherRole):
        for model in models:
            known = {name: field for name, field in model.model_fields.items() if name not in settings.model_fields}
            fields |= {name: (field.annotation, field) for name, field in known.items() if name not in fields}
    own = (role,) if issubclass(settings, TeacherRole) else (Share,) if issubclass(role, Share) else ()
    name = kind.title().replace("_", "") + role.__name__
    return create_model(name, __base__=(settings, *own), __module__=__name__, __doc__=settings.__doc__, **fields)


def _again(role: type[Any], kind: str, state: dict[str, Any]) -> Any:
    section = role.of(kind)
    made = section.__new__(section)
    made.__setstate__(state)
    return made
