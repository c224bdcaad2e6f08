"""Compile every shipped kernel configuration ahead of time and state what the compiler made of it; needs no GPU.

`python -m lead_ds.kernels.aot` prints one JSON object per variant. A module of kernels takes part by being named in
`KERNEL_MODULES` and exposing `aot_variants(shared)`. That yields a `Variant` for each configuration that its launcher
can pick on a device that gives a block so much shared memory.
"""

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from lead_ds.kernels.dispatch import ADA, AMPERE, BLACKWELL, CDNA, HOPPER

KERNEL_MODULES = (
    "lead_ds.kernels.maxsim.triton_kernel",
    "lead_ds.kernels.layer_kl.triton_kernel",
    "lead_ds.kernels.attention_kl.triton_kernel",
    "lead_ds.kernels.attention_kl.head_mean_kernel",
    "lead_ds.kernels.interaction.triton_kernel",
)


@dataclass(frozen=True)
class Chip:
    """What code is compiled for: Triton's backend and architecture, threads of a warp, a block's shared memory in bytes."""

    backend: str
    arch: int | str
    warp: int
    shared: int


# A100; Ada (also sm_86, which has as much shared memory); H100 and H200; B200; consumer Blackwell; MI300.
CHIPS = {
    "sm_80": Chip("cuda", 80, 32, AMPERE),
    "sm_89": Chip("cuda", 89, 32, ADA),
    "sm_90": Chip("cuda", 90, 32, HOPPER),
    "sm_100": Chip("cuda", 100, 32, BLACKWELL),
    "sm_120": Chip("cuda", 120, 32, ADA),
    "gfx942": Chip("hip", "gfx942", 64, CDNA),
}


@dataclass(frozen=True)
class Variant:
    """One kernel with everything that its compilation depends on.

    `signature` names the type of each run-time argument in Triton's spelling ("*bf16", "i32", "fp32"); arguments in
    `constexprs` are left out of it. Pointers, and the integers named in `aligned`, are multiples of 16, as the launcher's
    are. `options` are num_warps and num_stages. With `pairs` above 1 the pointers to q, k and their gradients are tuples.
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int]
    expects_wgmma: bool
    aligned: tuple[str, ...] = field(default=())
    pairs: int = 1

    def with_ones(self) -> "Variant":
        """The same with every integer that the launcher specialises fixed at 1, as it does with one that happens to be 1."""
        fixed = {parameter.name for parameter in self.fn.params if not parameter.do_not_specialize}
        ones = [name for name, kind in self.signature.items() if kind == "i32" and name in fixed]
        return replace(
            self,
            name=f"{self.name}-ones",
            signature={name: kind for name, kind in self.signature.items() if name not in ones},
            constexprs=self.constexprs | dict.fromkeys(ones, 1),
            aligned=(),
        )


def variants(shared: int) -> Iterator[Variant]:
    """Every variant of every kernel module that is installed."""
    for module in KERNEL_MODULES:
        if find_spec(module) is not None:
            yield from import_module(module).aot_variants(shared)


def compile_variant(variant: Variant, chip: str = "sm_90") -> dict[str, Any]:
    """Compile for a chip; registers a thread, bytes spilled, shared bytes, and how many matrix instructions there are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    known = CHIPS[chip]
    names = variant.fn.arg_names
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, name in enumerate(names):
        kind = variant.signature.get(name, "constexpr")
        several = variant.pairs > 1 and re.fullmatch(r"([ts]?[qk]|d[qk])_ptr", name) and not _one(variant, name)
        signature[name] = (kind,) * variant.pairs if several else kind
        if kind.startswith("*") or name in variant.aligned:
            places = [(place, i) for i in range(variant.pairs)] if several else [(place,)]
            attributes |= {where: [["tt.divisibility", 16]] for where in places}
    constexprs = {(names.index(name),): value for name, value in variant.constexprs.items()}
    source = ASTSource(variant.fn, signature, constexprs, attributes)
    compiled = triton.compile(
        source, target=GPUTarget(known.backend, known.arch, known.warp), options=dict(variant.options)
    )
    text = compiled.asm["ptx" if known.backend == "cuda" else "amdgcn"]
    return {
        "name": variant.name,
        "chip": chip,
        **variant.options,
        **(_resources(compiled.asm["cubin"]) if known.backend == "cuda" else _amd_resources(text)),
        "shared": compiled.metadata.shared,
        "wgmma": len(re.findall(r"\bwgmma\.mma_async", text)),
        "matrix": len(re.findall(r"\bwgmma\.mma_async|\bmma\.sync|\btcgen05\.mma|\bv_mfma_", text)),
        "keeps_nan": len(re.findall(r"\bmax\.NaN\.f32|\bmax3?\.NaN|v_cmp_[uo]_f32|v_maximum", text)),
        "async_copies": len(re.findall(r"\bcp\.async\.c[ag]\.", text)),
        "expects_wgmma": variant.expects_wgmma and chip == "sm_90",
    }


def _one(variant: Variant, name: str) -> bool:
    """Whether a pointer is to one tensor of all pairs: dQ summed by atomics."""
    return name == "dq_ptr" and "ATOMIC" in variant.constexprs


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


def _amd_resources(assembly: str) -> dict[str, int]:
    """The same from AMD's assembly: vector registers, and bytes of scratch a thread."""
    found = {
        key: int(value) for key, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", assembly)
    }
    return {"registers": found["vgpr_count"], "stack": found["private_segment_fixed_size"]}


def main(name_contains: str = "", chip: str = "sm_90", ones: bool = False, hardest: bool = False) -> None:
    """Print a JSON object for each variant whose name contains the text ("-" and "_" are the same).

    With `ones`, the first variant of each kernel and choice of its switches, its integers fixed at 1. With `hardest`,
    of each kernel, tile and number of pairs the variant with the most switches on, for each element size.
    """
    chosen = [v for v in variants(CHIPS[chip].shared) if name_contains.replace("_", "-") in v.name.replace("_", "-")]
    if hardest:
        best: dict[Any, Variant] = {}
        for variant in chosen:
            # A kernel that owns rows, and the same that owns keys, are two.
            tiles = tuple(
                item for item in variant.constexprs.items() if not isinstance(item[1], bool) or item[0] == "OF_ROWS"
            )
            pointers = tuple(kind for kind in variant.signature.values() if "*" in kind)[:2]
            place = (variant.fn, pointers, variant.pairs, tiles[:-1])
            if place not in best or _load(variant) > _load(best[place]):
                best[place] = variant
        chosen = list(best.values())
    seen = set()
    for variant in chosen:
        if ones:
            switches = tuple((name, value) for name, value in variant.constexprs.items() if isinstance(value, bool))
            if (variant.fn, switches) in seen:
                continue
            seen.add((variant.fn, switches))
            variant = variant.with_ones()
        print(json.dumps(compile_variant(variant, chip)), flush=True)


def _load(variant: Variant) -> int:
    return sum(value is True for value in variant.constexprs.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", default="", help="only variants whose name contains this")
    parser.add_argument("--chip", choices=CHIPS, default="sm_90", help="what to compile for")
    parser.add_argument("--ones", action="store_true", help="compile with every specialised integer argument at 1")
    parser.add_argument(
        "--hardest",
        action="store_true",
        help="of each kernel, tile and number of pairs only the variant with most to do",
    )
    given = parser.parse_args()
    main(given.name, given.chip, given.ones, given.hardest)
