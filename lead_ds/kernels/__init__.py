"""Fused similarity and divergence kernels: plain tensors in, plain tensors out, nothing of the package above.

Each public function takes ``impl="auto" | "triton" | "torch"``. ``auto`` picks the Triton kernel for CUDA tensors that
it supports and the chunked torch implementation everywhere else; neither holds the full score map of a large problem.

The public names are resolved on first use, so that importing this package costs neither torch nor Triton.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# A subpackage and its function share a name. Loading the (empty) subpackages first and dropping the attributes that the
# import system sets for them leaves the names to `__getattr__`, whatever is imported later and in whatever order.
for _name in ("attention_kl", "layer_kl", "maxsim"):
    import_module(f"{__name__}.{_name}")
    del globals()[_name]

if TYPE_CHECKING:
    from lead_ds.kernels.attention_kl.op import attention_kl
    from lead_ds.kernels.grouped.op import grouped_attention_kl
    from lead_ds.kernels.interaction.op import interaction_attention
    from lead_ds.kernels.layer_kl.inputs import Factors
    from lead_ds.kernels.layer_kl.op import factors_kl, layer_kl
    from lead_ds.kernels.maxsim.op import maxsim

__all__ = [
    "Factors",
    "attention_kl",
    "factors_kl",
    "grouped_attention_kl",
    "interaction_attention",
    "layer_kl",
    "maxsim",
]

_HOME = {
    "attention_kl": "lead_ds.kernels.attention_kl.op",
    "grouped_attention_kl": "lead_ds.kernels.grouped.op",
    "interaction_attention": "lead_ds.kernels.interaction.op",
    "Factors": "lead_ds.kernels.layer_kl.inputs",
    "factors_kl": "lead_ds.kernels.layer_kl.op",
    "layer_kl": "lead_ds.kernels.layer_kl.op",
    "maxsim": "lead_ds.kernels.maxsim.op",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
