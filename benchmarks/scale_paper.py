"""On paper, from what `benchmarks.scale` measured: collections that fit no machine here.

    python -m benchmarks.scale_paper [--passages 138364198 1000000000] [--queries 277144] [--memory 64] [--cores 16]
        [--hours 24] [--results benchmarks/results/scale-cpu.json]

Default sizes: MS MARCO v2's passages and training queries (https://microsoft.github.io/msmarco/TREC-Deep-Learning), and 10^9.
Vectors are as wide as the measured ones. What one more passage costs is the slope between a step's two largest sizes, which
leaves out start and imports. A core is one thread of the machine in the results. An index takes half of a machine's memory
at most, and every machine answers every query over its part. Cells: 4 times the root of the passages, found by HNSW, ASKED of
them looked into. How much an index finds at these sizes is not known.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from benchmarks.scale import OUT, Row, results
from benchmarks.scale_data import GROUP_OF, WIDTH

Rows = dict[tuple[str, str, int], Row]
ENCODED = Path("benchmarks/results/encode-cpu.json")
SHARE_ASKED = 32 / 1024  # of the cells of a measured index
ASKED = 128
OF_MEMORY = 0.5
CODES = {"pq": WIDTH // 4, "sq8": WIDTH, "binary": WIDTH // 8}  # bytes
ID = 8


def main(given: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, nargs="*", default=[138_364_198, 1_000_000_000])
    parser.add_argument("--queries", type=int, default=277_144)
    parser.add_argument("--memory", type=int, default=64, help="GB of a machine")
    parser.add_argument("--cores", type=int, default=16, help="of a machine")
    parser.add_argument("--hours", type=float, default=24, help="in which a step must end")
    parser.add_argument("--results", type=Path, default=OUT)
    options = parser.parse_args(given)
    rows = results(options.results)
    for passages in options.passages:
        print(f"\n{passages:,} passages, {options.queries:,} queries\n")
        print(work(rows, passages, options))
        print()
        print(indexes(rows, passages, options))


def measured(rows: Rows, row: str, step: str) -> list[Row]:
    """A step at its sizes, the smallest first."""
    return [rows[key] for key in sorted(rows, key=lambda key: key[2]) if key[:2] == (row, step)]


def slope(found: list[Row], of: str = "processor") -> float | None:
    """Seconds (`own`: MiB) for one more passage, between the two largest sizes; None where two are not measured."""
    if len(found) < 2:
        return None
    low, high = found[-2:]
    return (high[of] - low[of]) / (high["size"] - low["size"])


def work(rows: Rows, passages: int, options: argparse.Namespace) -> str:
    """Markdown: core-hours of each step, and the machines that end it in time, and hold what it holds."""
    seconds: dict[str, float] = {}
    for name, of, step in (("corpus indexed", "open", "index"), ("tokens kept", "kept", "tokens")):
        each = slope(measured(rows, of, step))
        if each is not None:
            seconds[name] = each * passages
    for line in ENCODED.read_text("utf-8").splitlines() if ENCODED.exists() else []:
        row = json.loads(line)
        if row["model"] == "minilm-l3" and row["precision"] == "bf16":  # the latest
            name = f"encoded by MiniLM of 3 layers in bf16, {row['tokens'] // row['texts']} tokens a passage"
            seconds[name] = sorted(row["seconds"]["processor"]["ours"])[2] / row["texts"] * passages
    more = slope(measured(rows, "open", "index"), "own")
    held = f"a corpus of so many is indexed in {more * passages / 1024:,.1f} GiB\n\n" if more else ""
    lines = [f"{held}| step | core-hours | machines |", "|---|---|---|"]
    for name, spent in seconds.items():
        lines.append(f"| {name} | {spent / 3600:,.1f} | {math.ceil(spent / 3600 / options.cores / options.hours):,} |")
    spread = math.ceil(4 * WIDTH * passages / 1e9 / options.memory / OF_MEMORY)
    for step in ("mine", "evaluate"):  # every query meets every passage, whose vectors are spread over the machines
        for row in measured(rows, step, step)[-1:]:
            hours = row["processor"] / (row["size"] ** 2 / GROUP_OF) * options.queries * passages / 3600
            many = max(math.ceil(hours / options.cores / options.hours), spread)
            lines.append(f"| {step}, exactly | {hours:,.0f} | {many:,} |")
    return "\n".join(lines)


def indexes(rows: Rows, passages: int, options: argparse.Namespace) -> str:
    """Markdown: size, machines, building and searching of each kind of index that was measured at two sizes."""
    cells = 1 << round(math.log2(4 * passages**0.5))
    title = f"index of {cells:,} cells, {ASKED} asked"
    lines = [
        f"| {title} | GB | machines | build, core-hours | searches a second | measured at | recall there |",
        "|---|---|---|---|---|---|---|",
    ]
    nearest = measured(rows, "index", "search_hnsw")
    for kind, code in CODES.items():
        built, asked = measured(rows, "index", f"build_{kind}"), measured(rows, "index", f"search_{kind}")
        each = slope(built)
        if each is None or not asked or not nearest:
            continue
        # HNSW over about as many vectors as there are cells: the fewest measured.
        cell, largest = 1 / nearest[0]["rate"], asked[-1]
        size = (code + ID) * passages / 1e9
        machines = math.ceil(size / options.memory / OF_MEMORY)
        scanned = 1 / largest["rate"] / (largest["size"] * SHARE_ASKED)  # seconds a code
        query = cell + scanned * passages / machines * ASKED / cells
        lines.append(
            f"| {kind} | {size:,.1f} | {machines:,} | {passages * (each + cell) / 3600:,.1f} | {options.cores / query:,.0f} "
            f"| {largest['size']:,} | {largest['recall']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
