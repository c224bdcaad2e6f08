"""Compile every shipped kernel configuration ahead of time and state what the compiler made of it; needs no GPU.

`python -m lead_ds.kernels.aot` prints one JSON object per variant. A module of kernels takes part by being named in
`KERNEL_MODULES` and exposing `aot_variants()`, which yields a `Variant` for each configuration that its launcher can pick.
"""

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

KERNEL_MODULES = (
    "lead_ds.kernels.maxsim.triton_kernel",
    "lead_ds.kernels.layer_kl.triton_kernel",
    "lead_ds.kernels.attention_kl.triton_kernel",
)


@dataclass(frozen=True)
class Variant:
    """One kernel with everything that its compilation depends on.

    `signature` names the type of each run-time argument in Triton's spelling ("*bf16", "i32", "fp32"); arguments in
    `constexprs` are left out of it. Pointers, and the integers named in `aligned`, are multiples of 16, as the launcher's are.
    `options` are num_warps and num_stages.
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int]
    expects_wgmma: bool
    aligned: tuple[str, ...] = field(default=())

    def with_ones(self) -> "Variant":
        """The same with every 32-bit integer fixed at 1, as the launcher specialises an argument that happens to be 1."""
        ones = [name for name, kind in self.signature.items() if kind == "i32"]
        return replace(
            self,
            name=f"{self.name}-ones",
            signature={name: kind for name, kind in self.signature.items() if name not in ones},
            constexprs=self.constexprs | dict.fromkeys(ones, 1),
            aligned=(),
        )


def variants() -> Iterator[Variant]:
    """Every variant of every kernel module that is installed."""
    for module in KERNEL_MODULES:
        if find_spec(module) is not None:
            yield from import_module(module).aot_variants()


def compile_variant(variant: Variant, capability: int = 90) -> dict[str, Any]:
    """Compile for a CUDA architecture; registers a thread, spilled registers, shared bytes, and what the PTX holds."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.fn.arg_names
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if signature[name].startswith("*") or name in variant.aligned
    }
    constexprs = {(names.index(name),): value for name, value in variant.constexprs.items()}
    source = ASTSource(variant.fn, signature, constexprs, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(variant.options))
    ptx = compiled.asm["ptx"]
    resources = _resources(compiled.asm["cubin"])
    return {
        "name": variant.name,
        "capability": capability,
        **variant.options,
        **resources,
        "shared": compiled.metadata.shared,
        "wgmma": len(re.findall(r"\bwgmma\.mma_async", ptx)),
        "async_copies": len(re.findall(r"\bcp\.async\.c[ag]\.", ptx)),
        "expects_wgmma": variant.expects_wgmma,
    }


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread and bytes of stack a thread (where spilled registers go), from the CUDA binary."""
    import subprocess
    import tempfile

    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {"registers": found["REG"], "stack": found["STACK"] + found["LOCAL"]}


def main(name_contains: str = "", ones: bool = False) -> None:
    """Print a JSON object for each variant whose name contains the text ("-" and "_" are the same).

    With `ones`, the first variant of each kernel and choice of its switches, its integers fixed at 1.
    """
    seen = set()
    for variant in variants():
        if name_contains.replace("_", "-") not in variant.name.replace("_", "-"):
            continue
        if ones:
            switches = tuple((name, value) for name, value in variant.constexprs.items() if isinstance(value, bool))
            if (variant.fn, switches) in seen:
                continue
            seen.add((variant.fn, switches))
            variant = variant.with_ones()
        print(json.dumps(compile_variant(variant)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", default="", help="only variants whose name contains this")
    parser.add_argument("--ones", action="store_true", help="compile with every integer argument specialised to 1")
    given = parser.parse_args()
    main(given.name, given.ones)
