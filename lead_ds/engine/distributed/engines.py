"""DeepSpeed's engines: begun here, and let go where the work of the processes that share them ends.

What DeepSpeed leaves on a parameter holds it in circles that pass through C++, where Python's collector cannot follow. One is a
hook on its gradient, another a view of it among its own attributes. Left there, a run would stay for good: its weights, its
optimizer's states, its process groups with their threads and sockets.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

_begun: list[list[Begun]] = []  # in each `engines_let_go` that is open


def begin_engine(model: nn.Module, **how: Any) -> Any:
    """`deepspeed.initialize(model=model, **how)`'s engine, let go at the end of the innermost `engines_let_go`."""
    import deepspeed

    begun = Begun.of(model)
    if _begun:
        _begun[-1].append(begun)  # now: one that fails half way has left its hooks, too
    begun.engine = deepspeed.initialize(model=model, **how)[0]
    return begun.engine


@contextmanager
def engines_let_go() -> Iterator[None]:
    """At its end, models whose engines were begun within hold nothing that DeepSpeed gave them.

    Not `engine.destroy()`: that leaves attributes which hold groups, knows nothing of what ZeRO-3 keeps, and waits for the
    GPU, where after an error another rank may be waited for. The engine calls it itself when it is collected.
    """
    _begun.append([])
    try:
        yield
    finally:
        begun = _begun.pop()
        some = bool(begun)
        while begun:
            with suppress(Exception):  # told is the error that ended the work, not one of these
                begun.pop().let_go()  # not by a name, which would hold it
        if some:
            gc.collect()  # now, not when the next run has filled the memory as well


# A module's hooks, by the names that torch has for them.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Begun:
    """A model with an engine, and which attributes its parameters had before."""

    model: nn.Module
    parameters: list[tuple[nn.Parameter, frozenset[str]]]
    engine: Any = None

    @classmethod
    def of(cls, model: nn.Module) -> Begun:
        """A model that has no engine yet."""
        return cls(model, [(parameter, frozenset(vars(parameter))) for parameter in model.parameters()])

    def let_go(self) -> None:
        """Take off what DeepSpeed has put on the model, and take the model from where DeepSpeed keeps it."""
        for module in self.model.modules():
            if _is_deepspeeds(module._parameters):  # which gathers what is asked for
                module._parameters = dict(module._parameters)
            _take_out(vars(module))
            for name in _HOOKS:
                _take_out(getattr(module, name))
        for parameter, before in self.parameters:
            _take_out(getattr(parameter, "_post_accumulate_grad_hooks", None) or {})
            for name in vars(parameter).keys() - before:
                delattr(parameter, name)
        _leave_zero_3(self.model)
        monitor = getattr(self.engine, "monitor", None)
        writer = getattr(getattr(monitor, "tb_monitor", None), "summary_writer", None)  # which has a thread
        if writer is not None:
            with suppress(Exception):  # each event has been flushed: a full disk was reported then
                writer.close()


def _take_out(of: dict[Any, Any]) -> None:
    """Take out DeepSpeed's of these."""
    for key, value in list(of.items()):
        if _is_deepspeeds(value):
            del of[key]


def _is_deepspeeds(value: Any) -> bool:
    value = getattr(value, "_torchdynamo_orig_callable", value)  # of a function that torch.compile leaves alone
    while isinstance(value, partial):
        value = value.func
    return str(getattr(value, "__module__", "")).startswith("deepspeed.")


def _leave_zero_3(model: nn.Module) -> None:
    """Take a model out of what ZeRO-3 keeps for the whole process: a stack of modules, and a cache of a class's method."""
    try:
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
        from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    except ImportError:  # another version of DeepSpeed
        return
    own = set(model.modules())
    FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module not in own]
    for method in vars(PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():  # the method is wrapped once more
            with suppress(ValueError):  # an empty one
                getattr(cell.cell_contents, "cache_clear", int)()
