"""Exact search in torch against faiss.IndexFlatIP on the CPU: the same vectors, in turns.

    python -m benchmarks.search [--passages 100000] [--queries 1 64 1000] [--width 384] [--k 10] [--threads 1]
        [--out benchmarks/results/search-cpu.json]

Random unit vectors; neither side counts loading or building. Each round runs both, the first one alternating; medians by the
wall's clock and by this process's processor time. Results are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import date
from pathlib import Path

import faiss
import numpy as np
import torch

from benchmarks.encode import versions
from benchmarks.kernels import machine
from lead_ds.retrieval.exact import exact_search


def main() -> None:
    """Measure, print a line for each number of queries, append rows to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 64, 1000])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    passages = torch.nn.functional.normalize(torch.randn(options.passages, options.width, generator=generator), dim=1)
    index = faiss.IndexFlatIP(options.width)
    index.add(passages.numpy())
    for count in options.queries:
        queries = torch.nn.functional.normalize(torch.randn(count, options.width, generator=generator), dim=1)
        systems = {
            "ours": lambda queries=queries: exact_search(queries, passages, options.k)[1].numpy(),
            "faiss": lambda queries=queries: index.search(queries.numpy(), options.k)[1],
        }
        found = {name: run() for name, run in systems.items()}
        wall: dict[str, list[float]] = {name: [] for name in systems}
        processor: dict[str, list[float]] = {name: [] for name in systems}
        for turn in range(options.rounds):
            for name in sorted(systems, reverse=bool(turn % 2)):
                starts = time.perf_counter(), time.process_time()
                systems[name]()
                wall[name].append(time.perf_counter() - starts[0])
                processor[name].append(time.process_time() - starts[1])
        ratios = [statistics.median(t["faiss"]) / statistics.median(t["ours"]) for t in (wall, processor)]
        same = float(np.mean(found["ours"] == found["faiss"]))
        print(
            f"{count} queries x {options.passages} passages x {options.width}, k {options.k}: {ratios[1]:.2f}x of FAISS's "
            f"speed by processor time, {ratios[0]:.2f}x by the wall's clock; {same:.2%} of the results in the same place"
        )
        if options.out:
            row = {"queries": count, "passages": options.passages, "width": options.width, "k": options.k}
            row |= {"threads": options.threads, "machine": machine(torch.device("cpu")), "same": same}
            row |= {"ratio_wall": ratios[0], "ratio_processor": ratios[1], "versions": versions()}
            row |= {"seconds": {"wall": wall, "processor": processor}, "date": date.today().isoformat()}
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
