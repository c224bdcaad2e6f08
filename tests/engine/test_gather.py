"""One process and two give the same loss and the same gradients, for every kind of teacher and both batch scopes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lead_ds.config import Config
from lead_ds.engine.distributed.ranks import Ranks, ranks
from lead_ds.engine.records.phases import Phases
from lead_ds.engine.training.step import RankScope
from lead_ds.losses import LossShape, ModelFacts, Objective, Side, Views
from lead_ds.relevance import Features, ScoreFeatures, TokenFeatures, VectorFeatures
from tests.helpers.launch import launch

QUERIES, GROUP, LAYERS, WIDTH, TOKENS = 6, 3, 2, 8, 5


def config_of(in_batch: str, batch_size: int) -> Config:
    return Config.model_validate(
        {
            "teacher": {"kind": "dual_encoder", "path": "-"},
            "student": {"path": "-"},
            "data": {"path": "-", "negatives": GROUP - 1},
            "losses": {"margin_mse": {"weight": 0.1}, "layer": {"k": LAYERS, "layer_temperature": 0.5}},
            "train": {"in_batch": in_batch, "batch_size": batch_size},
        }
    )


def features(
    kind: str, width: int, k: int, generator: torch.Generator, part: slice, grad: bool
) -> tuple[Features, list]:
    """The features of the queries in `part`; the whole batch is drawn on every process."""
    own = slice(part.start * GROUP, part.stop * GROUP)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    if kind == "cross_encoder":
        return ScoreFeatures(draw(k, QUERIES, GROUP)[:, part]), []
    if kind == "dual_encoder":
        q = draw(k, QUERIES, width)[:, part].clone().requires_grad_(grad)
        p = draw(k, QUERIES * GROUP, width)[:, own].clone().requires_grad_(grad)
        return VectorFeatures(q, p), [q, p]
    # Ranks hold passages of different lengths: cut each rank's to its own longest.
    lengths = torch.randint(1, TOKENS + 1, (QUERIES * GROUP,), generator=generator)
    q, p = draw(k, QUERIES, 4, width), draw(k, QUERIES * GROUP, TOKENS, width)
    p_mask = torch.arange(TOKENS)[None, :] < lengths[:, None]
    longest = int(lengths[own].max())
    q, p = q[:, part].clone().requires_grad_(grad), p[:, own, :longest].clone().requires_grad_(grad)
    return TokenFeatures(q, torch.ones(q.shape[1:3]), p, p_mask[own, :longest].long()), [q, p]


CASES = [(kind, in_batch) for kind in ("dual_encoder", "colbert", "cross_encoder") for in_batch in ("global", "local")]


def job() -> dict[str, Any]:
    """Every case as this process sees it. Alone, it holds the whole batch in the global scope; in the local one, both
    ranks' halves in turn."""
    with ranks() as here:
        return {
            f"{kind} {in_batch}": case(here, kind, in_batch, 2 if in_batch == "local" and here.world == 1 else 1)
            for kind, in_batch in CASES
        }


def case(here: Ranks, kind: str, in_batch: str, batches: int) -> dict[str, Any]:
    """Loss and student gradients of the whole batch, as this process sees its share: `batches` micro-batches of it."""
    total = here.world * batches
    size = QUERIES // total
    config = config_of(in_batch, size)
    scope = RankScope.of(in_batch, here, GROUP, "torch", Phases())
    facts, selected = ModelFacts(kind, LAYERS), list(range(LAYERS))
    objective = Objective(config.losses, LossShape(facts, facts, "torch"))
    asked = objective.asked([{"layer": (selected, selected)}])
    result: dict[str, Any] = {"loss": 0.0, "weights": [], "grads": []}
    for index in range(batches):
        part = slice((here.rank + index) * size, (here.rank + index + 1) * size)
        generator = torch.Generator().manual_seed(7)
        teacher = [features(kind, 6, k, generator, part, False)[0] for k in (1, LAYERS)]
        (final, leaf_final), (layers, leaf_layers) = (
            features("dual_encoder", WIDTH, k, generator, part, True) for k in (1, LAYERS)
        )
        # Two queries share a passage, and one of them is also the other's positive: masked in the same places.
        keys = torch.arange(QUERIES * GROUP)
        keys[4 * GROUP] = keys[0]
        positives = keys[::GROUP, None]
        own = keys[part.start * GROUP : part.stop * GROUP], positives[part]
        output = objective([Views(Side(final, layers), Side(*teacher), scope, own)], asked)
        # What data parallelism does with a rank's loss, and accumulation with a micro-batch's: the mean.
        (output.loss / total).backward()
        result["loss"] += output.loss.item() / batches
        result["weights"].append(output.layers["layers"]["weights"].tolist())
        result["grads"].append([leaf.grad.tolist() for leaf in leaf_final + leaf_layers])
    result["loss"] = float(here.mean(torch.tensor(result["loss"])))
    return result


def joined(results: list[dict[str, Any]]) -> list[torch.Tensor]:
    """Gradients of all micro-batches of all ranks, in order of queries."""
    parts = [grads for result in results for grads in result["grads"]]
    return [torch.cat([torch.tensor(part[i]) for part in parts], 1) for i in range(4)]


@pytest.fixture(scope="module")
def results() -> dict[int, list[dict[str, Any]]]:
    return {world: launch("tests.engine.test_gather:job", world) for world in (1, 2)}


@pytest.mark.parametrize(("kind", "in_batch"), CASES)
def test_two_processes_equal_one(results: dict[int, list[dict[str, Any]]], kind: str, in_batch: str) -> None:
    alone, both = ([result[f"{kind} {in_batch}"] for result in results[world]] for world in (1, 2))
    torch.testing.assert_close(torch.tensor(both[0]["loss"]), torch.tensor(alone[0]["loss"]), rtol=1e-5, atol=0)
    for one, two in zip(joined(alone), joined(both), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-7)
    weights = [w for result in both for w in result["weights"]]
    if in_batch == "global":
        assert weights[0] == weights[1], "layer weights must agree on all ranks"
    torch.testing.assert_close(torch.tensor(weights[0]), torch.tensor(alone[0]["weights"][0]), rtol=1e-5, atol=1e-7)
