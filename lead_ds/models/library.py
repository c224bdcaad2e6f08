"""sentence-transformers, without the packages that it imports for metrics, data sets and adapters.

No run of ours needs those, and they cost two seconds and 90 MiB. Each is imported as soon as anybody uses it.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, Union

_HEAVY = ("datasets", "pandas", "peft", "scipy", "sklearn")
_IMPORTERS = ("sentence_transformers", "transformers")


class Later:
    """Stands for a module, or for a function or class of it, and imports it when it is called, looked into or compared with.

    Of a class: what is an instance of the class is one of this, and who derives from this derives from the class.
    """

    def __init__(self, module: str, name: str = "") -> None:
        self.__dict__.update(_module=module, _name=name)

    def _real(self) -> Any:
        module = import_module(self._module)
        return getattr(module, self._name) if self._name else module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real(), name)

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._real()(*given, **named)

    def __getitem__(self, key: Any) -> Any:
        return self._real()[key]

    def __bool__(self) -> bool:
        """False for a name that this version of the package lacks: its users write `Name = None` for that."""
        return not self._name or hasattr(import_module(self._module), self._name)

    def __instancecheck__(self, thing: Any) -> bool:
        return isinstance(thing, self._real())

    def __subclasscheck__(self, kind: type) -> bool:
        return issubclass(kind, self._real())

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._real(),)

    def __or__(self, other: Any) -> Any:
        return Union[self, other]  # noqa: UP007 - the operator is this one

    __ror__ = __or__

    def __reduce__(self) -> tuple[Any, ...]:
        return Later, (self._module, self._name)


@contextmanager
def heavy_later() -> Iterator[None]:
    """Meanwhile, the two libraries are given a `Later` for what they import from a heavy package; nobody else is."""
    real = builtins.__import__

    def light(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        importer = str((globals or {}).get("__name__")).partition(".")[0]
        top, dot, _ = name.partition(".")
        late = level == 0 and importer in _IMPORTERS and top in _HEAVY and (fromlist or not dot)
        if not late or top in sys.modules or find_spec(top) is None:
            return real(name, globals, locals, fromlist, level)
        if not fromlist:
            return Later(name)
        # Its version is written into each model's card as the model is opened.
        names = {wanted: version(top) if wanted == "__version__" else Later(name, wanted) for wanted in fromlist}
        return SimpleNamespace(**names)

    builtins.__import__ = light
    try:
        yield
    finally:
        builtins.__import__ = real


def sentence_transformers() -> Any:
    """The package."""
    with heavy_later():
        return import_module("sentence_transformers")
