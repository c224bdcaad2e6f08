"""Parts that can be named in a configuration, ours and those of other packages."""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from lead_ds.errors import InputError

T = TypeVar("T")


class Registry(Generic[T]):
    """Classes by name: registered where they are defined, or found through an entry point of another package.

    >>> parts = Registry[type]("lead_ds.examples")
    >>> @parts.register("one")
    ... class One: ...
    >>> parts["one"].__name__
    'One'
    """

    def __init__(self, group: str, home: str | None = None) -> None:
        """home: a package of ours each of whose files may register parts; read when a name is first looked up."""
        self.group, self.home = group, home
        self._parts: dict[str, T] = {}
        self._searched = False

    def register(self, name: str):  # type: ignore[no-untyped-def]  # a decorator of whatever it is given
        """A decorator that names a class. Raises ValueError where the name is another's.

        A class that is defined again, as where a notebook's cell is run again, takes the place of what it was.
        """

        def named(part: T) -> T:
            if _home(self._parts.get(name, part)) != _home(part):
                raise ValueError(f"{self.group}: {name!r} is registered twice")
            self._parts[name] = part
            return part

        return named

    def __getitem__(self, name: str) -> T:
        self._search()
        try:
            return self._parts[name]
        except KeyError:
            near = difflib.get_close_matches(name, self._parts, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(self)}"
            raise KeyError(f"no {name!r} in {self.group}: {hint}") from None

    def __contains__(self, name: object) -> bool:
        self._search()
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        self._search()
        return iter(self._parts)

    def _search(self) -> None:
        """Load the files of our own folder, then the entry points of other packages, once, when a name is first looked up."""
        if self._searched:
            return
        self._searched = True
        if self.home is not None:
            for module in pkgutil.iter_modules(import_module(self.home).__path__, f"{self.home}."):
                import_module(module.name)
        for point in entry_points(group=self.group):
            if point.name in self._parts:
                continue
            try:
                part = point.load()
            except Exception as error:  # whatever the package's code raises
                what = f"the package that adds {point.name} cannot be imported: {type(error).__name__}: {error}"
                raise InputError(f"{self.group} ({point.value})", what, "mend it, or uninstall it") from error
            self.register(point.name)(part)


def _home(part: object) -> tuple[str, str]:
    return getattr(part, "__module__", ""), getattr(part, "__qualname__", repr(part))
