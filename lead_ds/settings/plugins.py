"""Modules that a configuration names so that the parts that they register can be used in it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from zlib import crc32

from lead_ds.errors import InputError

WHERE = "plugins"


def load_plugins(names: Iterable[str]) -> None:
    """Import modules by name, or Python files by path (`x.py`), each once in a process.

    Raises InputError where one cannot be imported.
    """
    for name in names:
        try:
            if name.endswith(".py"):
                _load_file(Path(name).expanduser().resolve())
            else:
                import_module(name)
        except InputError:
            raise
        except Exception as error:  # whatever its code raises
            what = f"{name} cannot be imported: {type(error).__name__}: {error}"
            raise InputError(WHERE, what, "name a Python file, or a module that is installed") from error


def _load_file(path: Path) -> None:
    name = f"lead_ds_plugin_{path.stem}_{crc32(str(path).encode())}"
    if name in sys.modules:
        return
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # as an import does, so that classes find their module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
