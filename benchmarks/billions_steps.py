"""The steps of `benchmarks.billions`: each on one process, or on several that RANK and WORLD_SIZE name.

    python -m benchmarks.billions_steps STEP SPEC.json OUT

writes what each process found to OUT.RANK.json. SPEC holds the model's shape and the run's configuration.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Facts = dict[str, Any]
MIB = 2**20
FORWARDS = 4
AIO_BUFFERS = 5  # parameters that ds_configs/teacher_zero3_nvme.json lets come from a disk at once


class Memory:
    """The most resident memory of this process, mapped files among it, looked at 200 times a second."""

    def __init__(self) -> None:
        self.peak, self._open = 0.0, True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while self._open:
            self.peak = max(self.peak, own())
            time.sleep(0.005)

    def begin(self) -> float:
        """Begin another peak; what is held now, without what is free."""
        gc.collect()
        settle()
        self.peak = own()
        return self.peak

    def end(self) -> None:
        """Look no more."""
        self._open = False
        self._thread.join()


def own(field: str = "VmRSS") -> float:
    """MiB of this process that are resident; RssFile: those of mapped files, which weights that were not copied are."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def settle() -> None:
    """Give back what is free."""
    import torch

    from benchmarks import throughput_memory

    throughput_memory.settle(torch.device("cpu"))


def config_of(spec: Facts) -> Any:
    """The run's configuration."""
    from lead_ds.config.load import parse_config

    return parse_config(spec["config"], "benchmarks.billions")


def weights(spec: Facts) -> Facts:
    """The teacher's weights, drawn at random, in bf16: a directory as it is published."""
    import torch
    from transformers import AutoConfig, AutoModel

    from benchmarks.throughput_presets import write_tokenizer

    shape = dict(spec["shape"])
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    begun = time.perf_counter()
    model = AutoModel.from_config(config)
    model.save_pretrained(spec["folder"])
    write_tokenizer(Path(spec["folder"]), decoder=True)
    return {"parameters": sum(p.numel() for p in model.parameters()), "seconds": time.perf_counter() - begun}


def adapter(spec: Facts) -> Facts:
    """A LoRA adapter over the base, as peft saves it, of random updates."""
    import peft
    import torch
    from transformers import AutoModel

    base = AutoModel.from_pretrained(spec["base"], dtype=torch.bfloat16)
    how = peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    model = peft.get_peft_model(base, how)
    model.peft_config["default"].base_model_name_or_path = spec["base"]
    model.save_pretrained(spec["folder"])
    return {"updates": sum(p.numel() for n, p in model.named_parameters() if "lora" in n)}


def alone(spec: Facts) -> Facts:
    """The teacher without a run: loading, what is held between forwards, forwards, and gathering all of it."""
    import deepspeed
    import torch

    from lead_ds.engine.distributed.ranks import ranks
    from lead_ds.engine.training.distill import open_inputs, settled
    from lead_ds.teachers.frozen import build_teacher
    from lead_ds.teachers.teacher import Lesson

    config = settled(config_of(spec))
    torch.set_num_threads(1)
    with ranks() as here:
        batches = open_inputs(config, here)[2]
        windows = [batches.window(step).teachers[0] for step in range(FORWARDS)]
        memory = Memory()
        before, files, begun = memory.begin(), own("RssFile"), time.perf_counter()
        teacher = build_teacher(Lesson.of(config), here)
        found: Facts = {"load_seconds": time.perf_counter() - begun, "load_peak": memory.peak - before}
        held, whole = teacher.parameter_bytes()
        found |= {"parameters_held": held / MIB, "parameters_whole": whole / MIB}
        spans: list[tuple[float, float]] = []
        for window in windows:
            if len(spans) == 1:  # the first forward finds out the order of parameters
                found["held_between_forwards"] = memory.begin() - before
            start = time.perf_counter(), time.process_time()
            teacher.window(window, [teacher.num_layers - 3, teacher.num_layers - 2])
            spans.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        found["forward_peak"] = memory.peak - before
        found["held_after"] = memory.begin() - before
        found["held_mapped"] = own("RssFile") - files
        found["forward_seconds"] = [wall for wall, _ in spans]
        found["forward_processor"] = [processor for _, processor in spans]
        if teacher.engine is not None:
            begun = time.perf_counter()
            for layer in teacher.scorer.capture.layers:
                all_of_it = list(layer.parameters())
                at_once = AIO_BUFFERS if spec["config"]["teacher"].get("offload") == "nvme" else len(all_of_it)
                for first in range(0, len(all_of_it), at_once):
                    with deepspeed.zero.GatheredParameters(all_of_it[first : first + at_once]):
                        pass
            found["gather_seconds"] = time.perf_counter() - begun
            # Any: `ds_numel` is DeepSpeed's.
            shards: list[Any] = [p for layer in teacher.scorer.capture.layers for p in layer.parameters()]
            found["gathered"] = sum(p.ds_numel * p.element_size() for p in shards) / MIB
        memory.end()
    return found


def teach(spec: Facts) -> Facts:
    """What `lead-ds teach --vectors` takes."""
    from lead_ds.teachers.teach import teach as run

    config, memory = config_of(spec), Memory()
    before, begun = memory.begin(), (time.perf_counter(), time.process_time())
    cache = run(config, Path(spec["cache"]), vectors="last:3", quiet=True)
    found = {"seconds": time.perf_counter() - begun[0], "processor": time.process_time() - begun[1]}
    found |= {"peak": memory.peak - before, "groups": len(cache)}
    memory.end()
    return found


def distill(spec: Facts) -> Facts:
    """A run, or its continuation: time, memory and loss of each step."""
    import torch

    from lead_ds.engine.records.callbacks import Callback, RunFacts
    from lead_ds.face.distiller import Distiller

    torch.set_num_threads(1)
    memory = Memory()
    steps: list[tuple[Any, ...]] = []

    class Steps(Callback):
        every_rank = True

        def on_start(self, run: RunFacts) -> None:
            found["start_seconds"] = time.perf_counter() - begun
            found["load_peak"] = memory.peak - before
            found["held_at_start"] = memory.begin() - before

        def on_step(self, metrics: Facts) -> None:
            now = time.perf_counter(), time.process_time(), own() - before
            steps.append((metrics["step"], *now, metrics["loss"]))
            found["peak"] = memory.peak - before

    found: Facts = {}
    before, begun = memory.begin(), time.perf_counter()
    run = Distiller.of(config_of(spec), callbacks=[Steps()])
    run.train(resume=bool(spec.get("resume")), quiet=True)
    memory.end()
    return {**found, "steps": steps}


STEPS: dict[str, Callable[[Facts], Facts]] = {
    "weights": weights,
    "adapter": adapter,
    "alone": alone,
    "teach": teach,
    "distill": distill,
}


def main() -> None:
    """Run the step that the command names."""
    import deepspeed  # noqa: F401  # whatever is imported later is no memory of the model
    import sentence_transformers  # noqa: F401
    import torch

    from benchmarks.throughput_memory import return_freed

    name, spec, out = sys.argv[1:]
    return_freed(torch.device("cpu"))
    found = STEPS[name](json.loads(Path(spec).read_text("utf-8")))
    Path(f"{out}.{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
