"""A student of several widths: trained, measured at each, read by its first dimensions by sentence-transformers and by ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lead_ds.data.collections.dataset import Dataset
from lead_ds.errors import InputError
from lead_ds.retrieval.encode import encode_to
from lead_ds.retrieval.evaluate import Task, evaluate_path, open_encoder
from lead_ds.retrieval.index import build_index
from lead_ds.retrieval.search import Searcher, evaluate_index, model_facts
from tests.engine.jobs import distil_each

DIMS = [4, 8, 16]


def test_trained_measured_and_read_by_first_dimensions(configure: Callable[..., Path], tmp_path: Path) -> None:
    weights: dict[str, Any] = {name: {"weight": 1.0} for name in ("embedding", "similarity", "spread")}
    evaluation = {"split": "dev", "metric": "nDCG@10", "measures": ["nDCG@10", "RR@10"]}
    config = configure(
        student={"path": "student", "normalize": True, "passage_length": 48, "dims": DIMS},
        losses={**weights, "layer": {"k": 2}},
        train={"steps": 3, "batch_size": 4, "lr": 1e-3, "evaluate_every": 2},
        evaluation=evaluation,
    )
    [losses] = distil_each([str(config)])
    assert len(losses) == 3
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    names = {"contrastive", "response", "layer", "embedding", "similarity", "spread"}
    parts = next(row["parts"] for row in rows if "parts" in row)
    assert parts.keys() == names | {f"{name}@{dim}" for name in names for dim in DIMS[:-1]}
    best = max((row for row in rows if "evaluation" in row), key=lambda row: row["evaluation"]["nDCG@10"])

    student = tmp_path / "run" / "student"
    data = yaml.safe_load(config.read_text())["data"]["path"]
    card = (student / "README.md").read_text()
    for dim in DIMS:
        scores = best["widths"][str(dim)]
        assert f"| {dim} | {scores['nDCG@10']:.4f} | {scores['RR@10']:.4f} |" in card
    assert best["widths"]["16"] == best["evaluation"]

    from sentence_transformers import SentenceTransformer

    dataset = Dataset.open(data)
    scorer, encoder = open_encoder(str(student), "cpu", dim=4)
    vectors = encode_to(tmp_path / "v", scorer.embed, encoder, dataset.corpus, model_facts(student, scorer))
    ours = np.concatenate(list(vectors.blocks()))
    assert ours.shape == (60, 4)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)
    theirs = SentenceTransformer(str(student), device="cpu", truncate_dim=4).encode_document(
        dataset.corpus.texts(range(60)), convert_to_tensor=True
    )
    torch.testing.assert_close(torch.from_numpy(ours), torch.nn.functional.normalize(theirs, dim=-1), atol=1e-5, rtol=0)

    # An index knows its width; the model follows.
    task = Task(dataset, "dev", ["nDCG@10"])
    index = build_index(vectors, tmp_path / "index", quiet=True)
    found = evaluate_index(str(student), index, task, quiet=True).mean["nDCG@10"]
    assert found == pytest.approx(best["widths"]["4"]["nDCG@10"], abs=1e-4)
    assert evaluate_path(student, data, "dev", ["nDCG@10"], dim=4, quiet=True)["nDCG@10"] == pytest.approx(
        found, abs=1e-4
    )
    with pytest.raises(InputError, match="has vectors of 4 dimensions"):
        Searcher.open(open_encoder(str(student), dim=8), index=index)
    with pytest.raises(InputError, match="dim is 17, its vectors have 16 dimensions"):
        open_encoder(str(student), dim=17)
