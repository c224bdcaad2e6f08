"""What the tests run on several processes, with the engine's ranks as peers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lead_ds.data.collections.dataset import Dataset
from lead_ds.data.collections.qrels import read_run
from lead_ds.engine.distributed.ranks import Ranks
from lead_ds.errors import LeadError
from lead_ds.retrieval.encode import Encoding, Stored, encode_to
from lead_ds.retrieval.evaluate import Task, evaluate_model, open_encoder
from lead_ds.retrieval.rerank import Reranker, rerank


@contextmanager
def ranks() -> Iterator[Ranks]:
    """The engine's processes, without the half minute that importing DeepSpeed takes."""
    dist.init_process_group("gloo")
    yield Ranks(dist.get_rank(), dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    dist.destroy_process_group()


def encode(model: str, data: str, outs: list[str], batch_size: int, shard_rows: int) -> list[Any]:
    """Encode the corpus into each folder: how often this process ran the model, or the error."""
    results: list[Any] = []
    with ranks() as here:
        scorer, encoder = open_encoder(model, "cpu")
        forwards = 0

        def embed(tokens: dict[str, torch.Tensor]) -> torch.Tensor:
            nonlocal forwards
            forwards += 1
            return scorer.embed(tokens)

        corpus = Dataset.open(data).corpus
        how, stored = Encoding(batch_size, lockstep=True), Stored(shard_rows=shard_rows)
        for out in outs:
            try:
                encode_to(out, embed, encoder, corpus, {"checksum": "m"}, how, stored, peers=here)
                results.append(forwards)
            except LeadError as error:
                results.append(str(error))
    return results


def evaluate(model: str, data: str, batch_size: int) -> dict[str, Any]:
    """Evaluate on the test split; metrics, and how often this process ran the model."""
    with ranks() as here:
        scorer, encoder = open_encoder(model, "cpu")
        forwards = 0

        def embed(tokens: dict[str, torch.Tensor]) -> torch.Tensor:
            nonlocal forwards
            forwards += 1
            return scorer.embed(tokens)

        scores = evaluate_model(
            scorer,
            encoder,
            Task(Dataset.open(data), "test"),
            batch_size=batch_size,
            embed=embed,
            peers=here,
            quiet=True,
        )
        return {"mean": scores.mean, "per_query": scores.per_query, "forwards": forwards}


def rerank_each(models: list[list[str]], data: str, runs: list[str], batch_size: int) -> list[dict[str, Any]]:
    """Rerank each run with each (kind, path): the scores, and how often this process ran the model."""
    results = []
    with ranks() as here:
        dataset = Dataset.open(data)
        for kind, path, *settings in models:
            model, forwards = Reranker.open(path, kind, settings, "cpu"), []
            model.scorer.register_forward_hook(lambda *_, seen=forwards: seen.append(1))  # type: ignore[misc]
            for run in runs:
                forwards.clear()
                found = rerank(
                    model.scorer, model.encoder, dataset, read_run(run), batch_size=batch_size, peers=here, quiet=True
                )
                results.append({"run": found, "forwards": len(forwards)})
    return results


def encode_and_die(model: str, data: str, out: str, batch_size: int, shard_rows: int, forwards: int) -> None:
    """Encode, and be killed in the middle of a shard."""
    scorer, encoder = open_encoder(model, "cpu")
    left = forwards

    def embed(tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        nonlocal left
        if left == 0:
            os._exit(9)  # nothing is closed or flushed
        left -= 1
        return scorer.embed(tokens)

    corpus = Dataset.open(Path(data)).corpus
    how, stored = Encoding(batch_size, lockstep=True), Stored(shard_rows=shard_rows)
    encode_to(out, embed, encoder, corpus, {"checksum": "m"}, how, stored)
