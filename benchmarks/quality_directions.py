"""The teacher of the quality benchmark in fewer dimensions: its vectors' main directions, as a model that can be evaluated.

    python -m benchmarks.quality_directions --models MODELS --work WORK --width 128
    lead-ds evaluate --model WORK/teacher-128 --data WORK/test/SET dtype=bf16 query_length=64 passage_length=64

The directions are those of 3,000 passages and 3,000 queries of the training set. What this costs is what a student of that
width has to win back.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.quality import settings_student
from lead_ds import load
from lead_ds.data.collections.dataset import Dataset

SAMPLE = 3_000


def main(given: list[str] | None = None) -> None:
    """Write WORK/teacher-WIDTH."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--width", type=int, default=128)
    options = parser.parse_args(given)
    path, read = options.models / "bge-small", settings_student("teacher-de")
    teacher = load(path, **read, dtype="bf16")
    queries, passages = Dataset.open(options.work / "train").sample(SAMPLE)
    vectors_ND = torch.cat([teacher.encode(queries, "queries"), teacher.encode(passages, "passages")])
    _, strengths_D, directions_DD = torch.linalg.svd(vectors_ND, full_matrices=False)
    kept = strengths_D[: options.width].square().sum() / strengths_D.square().sum()
    narrow = Dense(vectors_ND.size(1), options.width, bias=False, activation_function=torch.nn.Identity())
    narrow.linear.weight.data = directions_DD[: options.width].contiguous()
    modules = [Transformer(str(path)), Pooling(vectors_ND.size(1), read["pooling"]), narrow, Normalize()]
    model = SentenceTransformer(modules=modules, prompts={"query": read["query_prompt"]}, device="cpu")
    model.save(str(options.work / f"teacher-{options.width}"))
    print(f"{options.width} of {vectors_ND.size(1)} directions hold {kept:.1%} of the squared length")


if __name__ == "__main__":
    main()
