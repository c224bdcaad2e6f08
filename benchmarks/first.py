"""The first minute on a GPU: every kernel, compiled, against float64; and tiny distillations in 16 bits beside a CPU's.

    python -m benchmarks.first --out first.json                # one GPU, under a minute
    python -m benchmarks.first --out first.json --device cpu   # the same script where there is none: Triton's interpreter

Each part is a process of its own, side by side with the others, and says in one line what it found. Each kernel is compared
with its reference in float64, value and gradients, on awkward shapes, and is then run again and again: a race would give
other bits. The distillations are of one tiny pair and the same batches, so their losses must be a CPU's. Writes one JSON
object a line, as they come. Ends with status 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]
KERNELS = ("layer_kl", "maxsim", "attention_kl", "interaction")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# The largest error of a value or a gradient, of its largest number.
ALLOWED = {"bf16": 6e-2, "fp16": 1e-2, "fp32": 2e-5}
# A loss in 16 bits beside a CPU's in float32: of the first step, and of any.
NEAR = {"bf16": (1e-2, 5e-2), "fp16": (2e-3, 2e-2), "fp32": (1e-4, 1e-3)}
STEPS, PART_SECONDS = 10, 45


@dataclass(frozen=True)
class Case:
    """One call of a kernel: tensors without and with a gradient, and what else it is given, tensors on the CPU among it."""

    name: str
    fixed: dict[str, Tensor]
    leaves: dict[str, Tensor]
    how: dict[str, Any]


def layer_kl_cases(small: bool) -> Iterator[Case]:
    """A batch whose maps are kept, one whose are not; cosines, masks and temperatures; z-scores."""
    kept, large = (2, 19, 70, 48), (2, 65, 70, 48) if small else (3, 700, 2100, 144)
    for name, (k, q, p, d) in (("kept", kept), ("large", large), ("masked cosine", large), ("z-scores", large)):
        cosine = name == "masked cosine"
        shapes = {"tq": (k, q, d + 16), "td": (k, p, d + 16), "sq": (k, q, d), "sd": (k, p, d)}
        x = {key: torch.randn(shape) * (1.0 if cosine else d**-0.25) for key, shape in shapes.items()}
        how = {"target": torch.randint(0, p, (q,)), "cosine": cosine, "temperature": 0.05 if cosine else 1.0}
        how |= {"mask": torch.rand(q, p) > 0.2 if cosine else None, "standard": name == "z-scores"}
        yield Case(name, {key: x[key] for key in ("tq", "td")}, {key: x[key] for key in ("sq", "sd")}, how)


def layer_kl_call(target: Tensor, mask: Tensor | None, **given: Any) -> Tensor:
    """The kernel."""
    from lead_ds.kernels import factors_kl

    return factors_kl(*layer_kl_sides(given), target, mask=mask, impl="triton")[0]


def layer_kl_exact(target: Tensor, mask: Tensor | None, **given: Any) -> Tensor:
    """Its reference."""
    from lead_ds.kernels.layer_kl.reference import layer_kl_reference

    return layer_kl_reference(*layer_kl_sides(given), target, mask=mask)[0]


def layer_kl_sides(x: dict[str, Any]) -> tuple[Any, Any]:
    """Teacher and student, as both take them."""
    from lead_ds.kernels import Factors
    from lead_ds.kernels.deviations import inverse_deviations

    teacher, student = (Factors(x[f"{side}q"], x[f"{side}d"], x["temperature"], x["cosine"]) for side in "ts")
    scales = [inverse_deviations(side.q, side.d) if x["standard"] else None for side in (teacher, student)]
    return teacher._replace(row_scale=scales[0]), student._replace(row_scale=scales[1])


def maxsim_cases(small: bool) -> Iterator[Case]:
    """Widths that stay resident and that do not; masked cosines."""
    for name, width in (("d128", 48 if small else 128), ("d768, masked cosine", 80 if small else 768)):
        leaves = {"q": torch.randn(5, 19, width) * width**-0.5, "d": torch.randn(7, 70, width)}
        masked = "masked" in name
        masks = (torch.rand(5, 19) > 0.3, torch.rand(7, 70) > 0.3) if masked else (None, None)
        yield Case(name, {}, leaves, {"q_mask": masks[0], "d_mask": masks[1], "cosine": masked})


def maxsim_call(q: Tensor, d: Tensor, **how: Any) -> Tensor:
    """The kernel."""
    from lead_ds.kernels import maxsim

    return maxsim(q, d, impl="triton", **how)


def maxsim_exact(q: Tensor, d: Tensor, **how: Any) -> Tensor:
    """Its reference."""
    from lead_ds.kernels.maxsim.reference import maxsim_reference

    return maxsim_reference(q, d, **how)


def attention_kl_cases(small: bool) -> Iterator[Case]:
    """Grouped keys, padding, a causal window; averaged heads; the widest."""
    length, common, widest = (35, 16, 24) if small else (70, 64, 256)
    padded = {"mask": torch.arange(length) < torch.tensor([[length], [33], [1]]), "causal": True, "band": 20}
    for name, (heads, keys, width), how in (
        ("plain", (2, 2, common), {"mask": None}),
        ("grouped, padded, causal window", (4, 2, common), padded),
        ("averaged heads, the same", (4, 2, common), {**padded, "head_mean": True}),
        ("the widest heads", (2, 2, widest), {"mask": None}),
    ):
        shapes = {"tq": (3, heads, length, width), "tk": (3, keys, length, width)}
        fixed = {key: torch.randn(shape) for key, shape in shapes.items()}
        yield Case(name, fixed, {f"s{key[1]}": torch.randn(shape) for key, shape in shapes.items()}, how)


def attention_kl_call(tq: Tensor, tk: Tensor, sq: Tensor, sk: Tensor, mask: Tensor | None, **how: Any) -> Tensor:
    """The kernel, of two equal layer pairs in one launch."""
    from lead_ds.kernels import attention_kl

    return attention_kl([tq, tq], [tk, tk], [sq, sq], [sk, sk], mask, impl="triton", **how)


def attention_kl_exact(tq: Tensor, tk: Tensor, sq: Tensor, sk: Tensor, mask: Tensor | None, **how: Any) -> Tensor:
    """Its reference."""
    from lead_ds.kernels.attention_kl.inputs import Maps
    from lead_ds.kernels.attention_kl.reference import attention_kl_reference

    return attention_kl_reference(Maps(tq, tk), Maps(sq, sk), mask, **how)


def interaction_cases(small: bool) -> Iterator[Case]:
    """Own passages and all of them, by KL and by squared error."""
    masks = {"q_mask": torch.arange(5) < torch.tensor([[5], [2], [4]])}
    masks["d_mask"] = torch.arange(19) < torch.arange(1, 13)[:, None]
    for divergence, pairs in (("kl", "all"), ("mse", "own")):
        fixed = {"tq": torch.randn(2, 3, 5, 24), "td": torch.randn(2, 12, 19, 24)}
        leaves = {"sq": torch.randn(2, 3, 5, 16), "sd": torch.randn(2, 12, 19, 16)}
        yield Case(f"{divergence}, {pairs}", fixed, leaves, {"divergence": divergence, "pairs": pairs, **masks})


def interaction_call(**given: Any) -> Tensor:
    """The kernel."""
    from lead_ds.kernels import interaction_attention

    return interaction_attention(impl="triton", **given)


def interaction_exact(tq: Tensor, td: Tensor, sq: Tensor, sd: Tensor, **how: Any) -> Tensor:
    """Its reference."""
    from lead_ds.kernels.interaction.reference import interaction_reference

    return interaction_reference((tq, td, 1.0), (sq, sd, 1.0), **how)


# Cases, the kernel, its reference.
CASES: dict[str, tuple[Callable[[bool], Iterator[Case]], Callable[..., Tensor], Callable[..., Tensor]]] = {
    "layer_kl": (layer_kl_cases, layer_kl_call, layer_kl_exact),
    "maxsim": (maxsim_cases, maxsim_call, maxsim_exact),
    "attention_kl": (attention_kl_cases, attention_kl_call, attention_kl_exact),
    "interaction": (interaction_cases, interaction_call, interaction_exact),
}


def results(call: Callable[..., Tensor], case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    """The value and the gradients of a call of the case's tensors, in `dtype` on `device`."""
    fixed = {name: x.to(device, dtype) for name, x in case.fixed.items()}
    leaves = {name: x.detach().to(device, dtype).requires_grad_() for name, x in case.leaves.items()}
    how = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in case.how.items()}
    value = call(**fixed, **leaves, **how)
    weight = torch.linspace(0.5, 1.5, value.numel(), device=value.device, dtype=value.dtype).view_as(value)
    return [value.detach(), *torch.autograd.grad((value * weight).sum(), list(leaves.values()))]


def check_kernel(kernel: str, dtype: str, device: str, repeats: int) -> Iterator[Row]:
    """A row for each case: how far from float64, and whether every repetition gave the same bits."""
    torch.manual_seed(0)
    cases, call, exact_call = CASES[kernel]
    for case in cases(device == "cpu"):
        start = time.perf_counter()
        # The reference is given what the kernel is: numbers rounded to its dtype.
        fixed, leaves = ({n: x.to(DTYPES[dtype]) for n, x in some.items()} for some in (case.fixed, case.leaves))
        rounded = Case(case.name, fixed, leaves, case.how)
        exact = results(exact_call, rounded, torch.float64, "cpu")
        found = results(call, rounded, DTYPES[dtype], device)
        error = max(
            float((got.double().cpu() - true).abs().max() / true.abs().max().clamp(min=1e-12))
            for got, true in zip(found, exact, strict=True)
        )
        again = (results(call, rounded, DTYPES[dtype], device) for _ in range(repeats))
        equal = sum(all(map(torch.equal, one, found)) for one in again)
        right = error <= ALLOWED[dtype]
        yield {
            "part": f"{kernel} {dtype}",
            "case": case.name,
            "right": bool(right and equal == repeats),
            "error": error,
            "allowed": ALLOWED[dtype],
            "repeats": repeats,
            "equal": equal,
            "seconds": round(time.perf_counter() - start, 2),
        }


def write_pair(folder: Path) -> Path:
    """Tiny models with weights, texts, and the configuration of a run of them but for its dtypes."""
    from transformers import AutoConfig, AutoModel

    from benchmarks.throughput_presets import bert, write_data, write_tokenizer

    if (folder / "tree.json").exists():
        return folder
    torch.manual_seed(0)
    for name, layers, width in (("teacher", 4, 128), ("student", 2, 64)):
        shape = bert(layers, width, 2, vocab_size=1000, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        shape["initializer_range"] = 0.1
        kind = shape.pop("model_type")
        AutoModel.from_config(AutoConfig.for_model(kind, **shape)).save_pretrained(folder / name)
        write_tokenizer(folder / name, decoder=False)
    write_data(folder / "data", 64, 4, 16, 48, "natural")
    lengths = {"pooling": "cls", "query_length": 16, "passage_length": 48}
    tree = {
        "teacher": {"kind": "dual_encoder", "path": f"{folder}/teacher", "placement": "replicate", **lengths},
        "student": {"path": f"{folder}/student", **lengths},
        "data": {"path": f"{folder}/data", "negatives": 3},
        "losses": {"layer": {"k": 2}, "attention": {"weight": 1.0}},
        "train": {
            "steps": STEPS,
            "batch_size": 8,
            "lr": 2e-3,
            "log_every": 1,
            "save_every": 10**9,
            "evaluate_every": 0,
        },
        "evaluation": {"split": None},
        "monitor": {"tensorboard": False, "csv": False},
        # A scale at which no gradient of so small a pair leaves float16: a skipped step would not be the CPU's.
        "deepspeed": {"student": {"zero_optimization": {"stage": 1}, "fp16": {"initial_scale_power": 8}}},
    }
    (folder / "tree.json").write_text(json.dumps(tree))
    return folder


def distil(folder: Path, dtype: str, device: str) -> list[float]:
    """The losses of a run of the pair in `dtype`."""
    from lead_ds.config.load import parse_config
    from lead_ds.engine.training.distill import distill

    if dtype == "fp16" and device == "cpu":
        _allow_fp16()
    tree = json.loads((folder / "tree.json").read_text())
    for model in ("teacher", "student"):
        tree[model]["dtype"] = dtype
    tree["output"] = str(folder / f"run-{device}-{dtype}")
    distill(parse_config(tree, "first"), quiet=True)
    lines = (Path(tree["output"]) / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def _allow_fp16() -> None:
    """DeepSpeed refuses float16 on a CPU, which is slow at it and otherwise the same."""
    from deepspeed.accelerator import get_accelerator

    from lead_ds.engine.distributed import deepspeed_files

    get_accelerator().is_fp16_supported = lambda: True
    deepspeed_files.has_fp16 = lambda: True


def check_losses(name: str, dtype: str, losses: list[float], exact: list[float], seconds: float) -> Row:
    """One run beside the CPU's in float32."""
    apart = [abs(one - other) / max(abs(other), 1e-6) for one, other in zip(losses, exact, strict=True)]
    first, worst = NEAR[dtype]
    falls = losses[-1] < losses[0] if exact[-1] < exact[0] else True
    right = apart[0] <= first and max(apart) <= worst and falls
    row = {"part": f"distil {name}", "case": f"{STEPS} steps", "right": right, "error": max(apart), "allowed": worst}
    return row | {"first_step": apart[0], "losses": losses, "cpu_losses": exact, "seconds": round(seconds, 2)}


def told(part: str, rows: Sequence[Row]) -> str:
    """What a part found, in one line."""
    wrong = [row for row in rows if not row["right"]]
    share = max((row["error"] / row["allowed"] for row in rows), default=0.0)
    if wrong:
        names = "; ".join(
            f"{row['case']}: error {row['error']:.2g} of {row['allowed']:.0e} allowed"
            + (f", {row['repeats'] - row['equal']} of {row['repeats']} repetitions differ" if "repeats" in row else "")
            for row in wrong
        )
        return f"{part}: WRONG: {names}"
    more = f", {rows[0]['repeats']} repetitions equal" if "repeats" in rows[0] else ""
    seconds = sum(row["seconds"] for row in rows)
    return f"{part}: right, {len(rows)} case(s), at most {share:.2f} of the allowed error{more}, {seconds:.1f} s"


def in_process(part: str, folder: Path, device: str, repeats: int) -> Iterator[Row]:
    """The rows of one part, of a process of its own: `layer_kl bf16`, or `run cpu fp32`."""
    environment = dict(os.environ)
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0" if part.startswith("run") else "1"}
    command = [sys.executable, "-m", "benchmarks.first", "--part", part, "--folder", str(folder)]
    command += ["--device", device, "--repeats", str(repeats)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=PART_SECONDS if device == "cuda" else None
        )
        said = done.stdout
        problem = (done.stderr.strip().splitlines() or ["no output"])[-1][:300] if done.returncode or not said else ""
    except subprocess.TimeoutExpired as error:  # what it said until then counts
        said = (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        problem = f"no answer in {PART_SECONDS} s"
    yield from (
        json.loads(line) for line in said.splitlines(keepends=True) if line.startswith('{"') and line.endswith("\n")
    )
    if problem:
        yield {"part": part, "case": problem, "right": False, "error": float("inf"), "allowed": 0.0, "seconds": 0.0}


def main() -> None:
    """Run every part side by side; write and tell as they end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the rows")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, help="of each kernel's call; default 30, on a CPU 1")
    parser.add_argument("--parts", nargs="+", help="only these, such as 'maxsim bf16' or 'distil fp16'")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    repeats = given.repeats if given.repeats is not None else 30 if given.device == "cuda" else 1
    if given.part:
        one_part(given.part, given.device, repeats, given.folder)
        return
    if given.out is None:
        parser.error("--out is needed")
    # The interpreter's product of bfloat16 is wrong, and a GPU's float32 is asked of other kernels alone.
    dtypes = ("bf16", "fp16") if given.device == "cuda" else ("fp16", "fp32")
    kernels = [f"{kernel} {dtype}" for dtype in dtypes for kernel in KERNELS]
    wanted = given.parts or [*kernels, "distil bf16", "distil fp16"]
    halves = [part.split()[1] for part in wanted if part.startswith("distil")]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text("")
    kept: list[list[Row]] = []

    def keep(part: str, rows: list[Row]) -> None:
        with given.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        kept.append(rows)
        print(told(part, rows), flush=True)

    workers = max(1, min(len(wanted) + 1, os.cpu_count() or 1))
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(workers) as pool:
        folder = Path(temporary)
        runs: dict[str, Row] = {}
        if halves:
            write_pair(folder)
        parts = ["run cpu fp32"] if halves else []
        parts += [part for part in wanted if not part.startswith("distil")] + [
            f"run {given.device} {x}" for x in halves
        ]
        work = {}
        for part in parts:
            where = part.split()[1] if part.startswith("run") else given.device
            work[pool.submit(lambda *given: list(in_process(*given)), part, folder, where, repeats)] = part
        for done in as_completed(work):
            part, rows = work[done], done.result()
            if not part.startswith("run") or not rows[0]["right"]:
                keep(part, rows)
            else:
                runs[part] = rows[0]
            for dtype in list(halves):
                exact, found = runs.get("run cpu fp32"), runs.get(f"run {given.device} {dtype}")
                if exact and found:
                    halves.remove(dtype)
                    losses = found["losses"], exact["losses"]
                    keep(f"distil {dtype}", [check_losses(dtype, dtype, *losses, found["seconds"])])
    wrong = [told(rows[0]["part"], rows) for rows in kept if not all(row["right"] for row in rows)]
    print(f"found: {len(kept) - len(wrong)} of {len(wanted)} parts right{''.join(f'; {line}' for line in wrong)}")
    sys.exit(len(kept) - len(wrong) < len(wanted))


def one_part(part: str, device: str, repeats: int, folder: Path) -> None:
    """In a process of its own: print its rows."""
    name, *rest = part.split()
    if name == "run":
        start = time.perf_counter()
        losses = distil(folder, rest[1], device)
        print(json.dumps({"part": part, "right": True, "losses": losses, "seconds": time.perf_counter() - start}))
        return
    for row in check_kernel(name, rest[0], device, repeats):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
