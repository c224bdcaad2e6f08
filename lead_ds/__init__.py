"""Distil a large retrieval teacher into a small dense-retrieval student, layer by layer.

    from lead_ds import Distiller, Searcher, Reranker, load, losses, Callback

Names are imported when they are first used: `import lead_ds` itself costs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lead_ds import losses
    from lead_ds.face import Callback, Distiller, Model, Reranker, Searcher, load

__version__ = "0.1.0"
__all__ = ["Callback", "Distiller", "Model", "Reranker", "Searcher", "load", "losses"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return import_module("lead_ds.losses") if name == "losses" else getattr(import_module("lead_ds.face"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
