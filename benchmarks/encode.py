"""lead-ds encode against SentenceTransformer.encode: the same model, texts and machine, in turns.

    python -m benchmarks.encode --model MODEL --data DATA [--texts 600] [--batch-size 16] [--their-batch-size 32] [--threads 1]
        [--device cuda] [--precision bf16] [--their-precision fp32] [--out benchmarks/results/encode-cpu.json]

Each takes its own default batch, unless it is given. Each round runs both, the first one alternating; the medians are
compared. Two clocks: the wall's, and this process's processor time, which does not count what other programs on the
machine take. The package sentence-transformers reads in the same precision, under the same autocast, unless it is given
its own; float32 is its default. The vectors of both are compared, so that nobody is fast by doing less.

    python -m benchmarks.encode --parts --model MODEL --data DATA [--texts 600] [--precision bf16]

says where lead-ds's time goes: tokenising, products of layers, attention, the rest; and the rate of those products beside that
of one of 1,024 x 1,024 x 1,024 in the same precision.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.kernels import machine
from lead_ds.data.collections.dataset import Dataset
from lead_ds.models.export import export_sentence_transformers
from lead_ds.retrieval.encode import Encoding, encode_share
from lead_ds.retrieval.evaluate import open_encoder

# Operations by the part that they are of; what is none of these is the rest.
PARTS = {
    "products of layers": ("aten::addmm", "aten::mm", "aten::linear", "mkldnn", "aten::mkldnn_linear"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash_attention", "aten::bmm", "aten::_softmax"),
}

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    """Measure, print a line, and append a row to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=600)
    parser.add_argument(
        "--batch-size", type=int, default=16, help="of lead-ds; its default is 16 on a CPU, 64 on a GPU"
    )
    parser.add_argument(
        "--their-batch-size", type=int, default=32, help="of SentenceTransformer.encode; its default is 32"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=list(DTYPES))
    parser.add_argument("--their-precision", choices=list(DTYPES), help="of SentenceTransformer.encode; as --precision")
    parser.add_argument("--parts", action="store_true", help="say where the time of lead-ds goes, and no more")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.their_precision = options.their_precision or options.precision
    torch.set_num_threads(options.threads)
    if options.parts:
        print(json.dumps(parts(options)))
        return
    row = measure(options)
    batches = f"batches of {row['batch_size']} and {row['their_batch_size']}"
    precisions = " and ".join(dict.fromkeys((row["precision"], row["their_precision"])))
    print(
        f"{row['model']} on {row['data']}, {row['texts']} texts, {batches}, {precisions}: "
        f"{row['ratio_processor']:.2f}x by processor time, {row['ratio_wall']:.2f}x by the wall's clock; "
        f"vectors differ by {row['difference']:.1e}"
    )
    if options.out:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One row of results."""
    from sentence_transformers import SentenceTransformer

    device = torch.device(options.device)
    corpus = Dataset.open(options.data).corpus
    rows = np.sort(np.random.default_rng(0).choice(len(corpus), min(options.texts, len(corpus)), replace=False))
    texts = corpus.texts(rows)
    scorer, encoder = open_encoder(options.model, device)
    with tempfile.TemporaryDirectory() as folder:  # pooling and prompts as ours, also where MODEL is a bare transformer
        export_sentence_transformers(options.model, Path(folder) / "model")
        theirs = SentenceTransformer(str(Path(folder) / "model"), device=options.device)
    theirs.max_seq_length = encoder.passage_length
    how = Encoding(options.batch_size, device, options.precision)

    def ours(texts: list[str]) -> np.ndarray:
        def read(chosen: Any) -> list[str]:
            return [texts[i] for i in chosen]

        return encode_share(scorer.embed, encoder, "corpus", read, range(len(texts)), how).cpu().numpy()

    def sentence_transformers(texts: list[str]) -> np.ndarray:
        with torch.autocast(device.type, DTYPES[options.their_precision], enabled=options.their_precision != "fp32"):
            return theirs.encode(
                [encoder.passage_prompt + text for text in texts], batch_size=options.their_batch_size, prompt=""
            )

    systems: dict[str, Callable[[list[str]], np.ndarray]] = {"ours": ours, "theirs": sentence_transformers}
    vectors: dict[str, np.ndarray] = {}
    wall: dict[str, list[float]] = {name: [] for name in systems}
    processor: dict[str, list[float]] = {name: [] for name in systems}
    for run in systems.values():
        run(texts[:32])
    for turn in range(options.rounds):
        for name in sorted(systems, reverse=bool(turn % 2)):
            starts = time.perf_counter(), time.process_time()
            vectors[name] = systems[name](texts)
            wall[name].append(time.perf_counter() - starts[0])
            processor[name].append(time.process_time() - starts[1])
    medians = {
        clock: {name: statistics.median(times[name]) for name in systems}
        for clock, times in (("wall", wall), ("processor", processor))
    }
    return {
        "model": Path(options.model).name,
        "data": options.data.name,
        "texts": len(texts),
        "tokens": int(sum(encoder.passages([text])["attention_mask"].sum() for text in texts)),
        "batch_size": options.batch_size,
        "their_batch_size": options.their_batch_size,
        "precision": options.precision,
        "their_precision": options.their_precision,
        "threads": options.threads,
        "machine": machine(device),
        "seconds": {"wall": wall, "processor": processor},
        "ratio_wall": medians["wall"]["theirs"] / medians["wall"]["ours"],
        "ratio_processor": medians["processor"]["theirs"] / medians["processor"]["ours"],
        "difference": float(np.abs(vectors["ours"] - vectors["theirs"]).max()),
        "versions": versions(),
        "date": date.today().isoformat(),
    }


def parts(options: argparse.Namespace) -> dict[str, Any]:
    """Shares of the time of `encode_share`, by torch's profiler; what is outside of torch's operations is tokenising."""
    from torch.profiler import ProfilerActivity, profile

    device = torch.device(options.device)
    corpus = Dataset.open(options.data).corpus
    texts = corpus.texts(np.sort(np.random.default_rng(0).choice(len(corpus), options.texts, replace=False)))
    scorer, encoder = open_encoder(options.model, device)
    how = Encoding(options.batch_size, device, options.precision)

    def run() -> float:
        start = time.process_time()
        encode_share(scorer.embed, encoder, "corpus", lambda chosen: [texts[i] for i in chosen], range(len(texts)), how)
        return time.process_time() - start

    run()
    whole = min(run() for _ in range(options.rounds))
    start = time.process_time()
    for first in range(0, len(texts), 512):
        encoder.rows(texts[first : first + 512], "passages")
    spent = {"tokenising": time.process_time() - start}
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiled:
        run()
    events = profiled.key_averages()
    for part, names in PARTS.items():
        spent[part] = sum(event.self_cpu_time_total for event in events if event.key.startswith(names)) / 1e6
    products = sum(event.flops for event in events if event.key.startswith(("aten::addmm", "aten::mm", "aten::linear")))
    one = torch.randn(1024, 1024, dtype=DTYPES[options.precision])
    rates = []
    for _ in range(20):
        start = time.perf_counter()
        one @ one
        rates.append(2 * 1024**3 / (time.perf_counter() - start))
    return {
        "model": Path(options.model).name,
        "data": options.data.name,
        "texts": len(texts),
        "precision": options.precision,
        "machine": machine(device),
        "seconds": whole,
        "shares": {part: seconds / whole for part, seconds in spent.items()}
        | {"rest": 1 - sum(spent.values()) / whole},
        "products, FLOP/s": products / spent["products of layers"],
        "of a large product": products / spent["products of layers"] / statistics.median(rates),
        "date": date.today().isoformat(),
    }


def versions() -> dict[str, str]:
    """Of what was measured."""
    from importlib.metadata import version

    names = ("torch", "transformers", "sentence-transformers", "tokenizers", "faiss-cpu")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


if __name__ == "__main__":
    main()
