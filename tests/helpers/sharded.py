"""What ZeRO-3 holds of a module."""

from __future__ import annotations

from torch import nn


def resident_parameters(module: nn.Module) -> tuple[int, int]:
    """Elements of a sharded module's parameters that are gathered now, and that are meant to stay so."""
    resident = persistent = 0
    for parameter in module.parameters():
        if hasattr(parameter, "ds_status"):
            numel = getattr(parameter, "ds_numel", 0)
            resident += numel if parameter.ds_status.name == "AVAILABLE" else 0
            persistent += numel if getattr(parameter, "ds_persist", False) else 0
    return resident, persistent
