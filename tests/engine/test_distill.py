"""Whole runs on real processes: what must not change the losses does not, and what is killed resumes bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lead_ds.engine.records.checkpoint import damage
from tests.engine.jobs import losses_of
from tests.helpers.launch import ROOT, launch
from tests.helpers.rooms import TEACHERS

Configure = Callable[..., Path]
JOB = "tests.engine.jobs:distil_each"


def vectors(student: Path) -> torch.Tensor:
    """What a saved student makes of some passages."""
    from lead_ds.models.load import load_encoder

    scorer, encoder = load_encoder(str(student))
    with torch.no_grad():
        return scorer.embed(encoder.passages(["The octopus has three hearts.", "A glacier grinds rock into flour."]))


def test_every_teacher_against_a_student_of_another_architecture(configure: Configure, tmp_path: Path) -> None:
    paths = [str(configure(kind, kind)) for kind in TEACHERS]
    [results] = launch(JOB, 1, configs=paths)
    for kind, losses in zip(TEACHERS, results, strict=True):
        assert len(losses) == 6, losses
        assert np.isfinite(losses).all()
        assert (tmp_path / kind / "student" / "modules.json").exists()


def test_two_runs_in_one_process_that_leave_nothing_behind(configure: Configure, tmp_path: Path) -> None:
    code = (
        "import os, sys; before = set(os.environ)\n"
        "from lead_ds.config import load_config\n"
        "from lead_ds.engine.training.distill import distill\n"
        "for path in sys.argv[1:]: distill(load_config(path), quiet=True)\n"
        "print({'RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'} & (set(os.environ) - before))"
    )
    paths = [str(configure(name, train={"steps": 2})) for name in ("first", "second")]
    done = subprocess.run([sys.executable, "-c", code, *paths], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[-2] == "set()"
    assert losses_of(tmp_path / "first") == losses_of(tmp_path / "second")


def test_students_zero_stage_changes_nothing(configure: Configure, tmp_path: Path) -> None:
    stages = [
        str(
            configure(
                f"zero{stage}",
                extra_teacher={"placement": "zero3"},
                train={"batch_size": 2},
                deepspeed={"student": f"ds_configs/student_zero{stage}.json"},
            )
        )
        for stage in range(4)
    ]
    alone = str(configure("alone"))
    both = launch(JOB, 2, configs=stages)[0]
    [[one]] = launch(JOB, 1, configs=[alone])
    for stage, losses in enumerate(both):
        # Against one process with the whole batch: the teacher's, the student's and the optimizer's sharding at once.
        np.testing.assert_allclose(losses, one, rtol=1e-5, err_msg=f"ZeRO-{stage}")
    reference = vectors(tmp_path / "alone" / "student")
    for stage in range(4):
        torch.testing.assert_close(vectors(tmp_path / f"zero{stage}" / "student"), reference, rtol=1e-4, atol=1e-5)


def test_processes_micro_batches_and_chunks_change_nothing(configure: Configure) -> None:
    # In the local scope a rank's micro-batch is alone with itself, whether beside another rank's or after it.
    local = {"in_batch": "local", "batch_size": 2}
    ranks2 = configure("ranks2", train=local)
    accumulated = configure("accumulated", train={**local, "accumulation": 2})
    chunked = configure("chunked", extra_teacher={"batch_size": 4}, train={**local, "accumulation": 2})
    checkpointed = configure("checkpointed", train={**local, "accumulation": 2, "gradient_checkpointing": True})
    [both, _] = launch(JOB, 2, configs=[str(ranks2)])
    [one] = launch(JOB, 1, configs=[str(accumulated), str(chunked), str(checkpointed)])
    for losses in one:
        np.testing.assert_allclose(losses, both[0], rtol=1e-5)


def test_the_student_and_a_cotrained_teacher_learn(configure: Configure, tmp_path: Path) -> None:
    train = {"steps": 120, "save_every": 120, "lr": 1e-3, "batch_size": 8, "warmup_ratio": 0.0}
    paths = [
        configure("frozen", train=train),
        configure("cotrained", extra_teacher={"train": True, "path": "bert"}, train=train),
    ]
    [results] = launch(JOB, 1, configs=[str(path) for path in paths])
    for losses in results:
        assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10]), losses
    rows = [json.loads(line) for line in (tmp_path / "cotrained" / "metrics.jsonl").read_text().splitlines()]
    parts = rows[0]["parts"]
    assert {"teacher_contrastive", "response_reverse"} <= parts.keys()
    taught = [row["parts"]["teacher_contrastive"] for row in rows if "parts" in row]
    assert np.mean(taught[-5:]) < 0.9 * np.mean(taught[:5]), taught
    layers = rows[0]["layers"]
    assert sum(layers["weights"]) == pytest.approx(1)
    assert all(
        len(layers[name]) == 2 for name in ("teacher", "student", "kl", "nll", "teacher_entropy", "student_entropy")
    )


def test_attention_losses(configure: Configure) -> None:
    forms = [{"form": "self"}, {"form": "interaction"}, {"form": "interaction", "divergence": "mse"}]
    paths = [
        configure(
            f"attention{i}",
            extra_teacher={"path": "bert"},
            losses={"attention": {"weight": 1.0, "k": 2, "relation_heads": 4, **form}},
            train={"accumulation": 2, "batch_size": 2},
        )
        for i, form in enumerate(forms)
    ]
    # A Llama with its own byte-level tokenizer: compared by the words that both see; token by token is refused.
    for name, form in (("words", "self"), ("tokens", "interaction")):
        losses = {"attention": {"weight": 1.0, "k": 2, "relation_heads": 4, "form": form}}
        paths.append(configure(name, losses=losses, train={"batch_size": 2}))
    [results] = launch(JOB, 1, configs=[str(path) for path in paths])
    for losses in results[:-1]:
        assert len(losses) == 6, losses
        assert np.isfinite(losses).all()
    assert len({tuple(losses) for losses in results[:-1]}) == 4
    assert "use form: self" in results[-1]


def test_a_loss_that_is_not_finite_names_the_batch_and_keeps_the_checkpoint(
    configure: Configure, rooms: Path, tmp_path: Path
) -> None:
    # A student whose word "violin" is not a number: the run lives until a batch mentions it.
    import shutil

    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    broken = tmp_path / "broken"
    shutil.copytree(rooms / "student", broken)
    tokenizer = AutoTokenizer.from_pretrained(broken)
    queries = [json.loads(line) for line in (rooms / "data" / "queries.jsonl").read_text().splitlines()]
    word = "volcano"
    weights = load_file(broken / "model.safetensors")
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    weights["embeddings.word_embeddings.weight"][ids[0]] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    path = configure(
        "nan", student={"path": str(broken)}, train={"batch_size": 1, "steps": 30, "save_every": 1, "keep": 1}
    )
    [[told]] = launch(JOB, 1, configs=[str(path)])
    assert isinstance(told, str), "the run should have met the broken word"
    assert "the loss is not finite" in told
    assert ("lead-ds inspect" in told) == told.startswith("step 1:")
    assert any(f"queries {query['_id']}" in told for query in queries)
    assert "\n" not in told
    [checkpoint] = list((tmp_path / "nan" / "checkpoints").glob("step-*"))
    assert damage(checkpoint) is None
    assert not (tmp_path / "nan" / "student").exists()
