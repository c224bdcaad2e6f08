"""How many builds a run costs: the launchers run over batches of many lengths, and Triton's own keys are collected.

Nothing is launched, so that no GPU is needed; `python -m tests.kernels.builds` prints a JSON object, kernel by kernel.
"""

import json
from collections import Counter
from typing import Any

import torch
import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import create_function_from_signature

from lead_ds.kernels.attention_kl import head_mean_kernel as head_mean
from lead_ds.kernels.attention_kl import triton_kernel as attention
from lead_ds.kernels.attention_kl.inputs import LayerPair
from lead_ds.kernels.interaction import triton_kernel as interaction
from lead_ds.kernels.layer_kl import triton_kernel as layer
from lead_ds.kernels.layer_kl.inputs import Factors, Problem
from lead_ds.kernels.maxsim import triton_kernel as maxsim

BACKEND = backends["nvidia"].compiler(GPUTarget("cuda", 90, 32))
LENGTHS = (5, 8, 16, 17, 31, 32, 33, 47, 48, 64, 65, 96, 127, 128, 130, 180, 256, 300, 512)


class Builds:
    """Stands where `launch` stands, and keeps the key under which Triton would look a kernel's build up."""

    def __init__(self) -> None:
        self.keys: set[tuple[str, str]] = set()

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        assert isinstance(kernel, triton.JITFunction), "run without TRITON_INTERPRET"
        bind = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
        _, specialization, options = bind(*arguments, **constants)
        self.keys.add((kernel.__name__, f"{specialization} {sorted(options.items())}"))

    def count(self) -> Counter[str]:
        return Counter(name for name, _ in self.keys)


def vectors(*shape: int, width: int) -> torch.Tensor:
    return torch.zeros(*shape, width, dtype=torch.bfloat16)


def run_attention(length: int, batch: int) -> None:
    """Six layer pairs of a padded batch."""
    heads = [vectors(batch, length, 12, width=64).transpose(1, 2) for _ in range(4)]
    pairs = [LayerPair(*heads, 0.125, 0.125, None)] * 6
    _, saved = attention.forward(pairs, torch.ones(batch, length), causal=False)
    attention.backward(torch.ones(6), pairs, saved, causal=False, atomic=False)


def run_head_mean(length: int, batch: int) -> None:
    """The same, of averaged heads, of a teacher that has more of them, wider."""
    teacher, student = (
        [vectors(batch, length, heads, width=width).transpose(1, 2)] * 2 for heads, width in ((16, 128), (12, 64))
    )
    pairs = [LayerPair(*teacher, *student, 0.125, 0.125, None)] * 6
    _, saved = head_mean.forward(pairs, torch.ones(batch, length), causal=False, with_grad=True)
    head_mean.backward(torch.ones(6), pairs, saved, causal=False)


def run_maxsim(length_q: int, length_d: int, batch: int) -> None:
    """Both models' scores of a padded batch, of the final layer and of a hidden one; the student's gradient."""
    for width in (128, 768):
        q, d = vectors(batch, length_q, width=width), vectors(4 * batch, length_d, width=width)
        masks = torch.ones(q.shape[:2], dtype=torch.bool), torch.ones(d.shape[:2], dtype=torch.bool)
        maxsim.forward(q, d, *masks, False, False)
        _, argmax = maxsim.forward(q, d, *masks, False, True)
        maxsim.backward(torch.ones(len(q), len(d)), q, d, *masks, argmax, False)


def run_interaction(length: int, batch: int) -> None:
    """Every query's tokens over those of every passage."""
    maps = [torch.zeros(2, batch * 16, 4 * batch, length, device="meta") for _ in range(2)]
    mask, real = (torch.ones(2, *shape, dtype=torch.bool) for shape in ((4 * batch, length), (batch * 16, 4 * batch)))
    interaction.divergence(*maps, (0.125, 0.125), mask, real, True, torch.bfloat16)


def run_layer_kl(batch: int, *, scaled: bool) -> None:
    """Six layers of a masked batch whose last window is short."""
    scale = torch.ones(6, batch) if scaled else None
    teacher, student = (
        Factors(vectors(6, batch, width=w), vectors(6, 8 * batch, width=w), row_scale=scale) for w in (1024, 384)
    )
    problem = Problem(teacher, student, torch.zeros(batch, dtype=torch.long), torch.ones(batch, 8 * batch) > 0)
    _, _, maps, lse = layer.forward(problem, True)
    layer.backward(torch.ones(6), problem, maps, lse)


def main() -> None:
    found = {}
    modules = (("attention_kl", attention), ("head_mean", head_mean), ("maxsim", maxsim), ("interaction", interaction))
    modules += (("layer_kl", layer), ("layer_kl of z-scores", layer))
    for name, module in modules:
        module.launch = builds = Builds()  # type: ignore[attr-defined]
        for i, length in enumerate(LENGTHS):
            batch = 16 if i % 3 else 15
            if name == "attention_kl":
                run_attention(length, batch)
            elif name == "head_mean":
                run_head_mean(length, batch)
            elif name == "maxsim":
                run_maxsim(min(length, 64), length, batch)
            elif name == "interaction":
                run_interaction(length, batch)
        if module is layer:
            for batch in (64, 63, 16):
                run_layer_kl(batch, scaled=name != "layer_kl")
        found[name] = builds.count()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
