"""In which 16 bits a teacher is read, and what is said of one whose numbers do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lead_ds.config import Config, TeacherConfig
from lead_ds.engine.training.distill import distill
from lead_ds.errors import InputError
from lead_ds.models.dtypes import half_of, published_in, served_in
from lead_ds.models.load import load_scorer
from lead_ds.settings.parse import parse_section
from lead_ds.teachers.frozen import teacher_dtype
from tests.helpers.rooms import save_bert, settings
from tests.models.tiny_models import tiny_model


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Gemma whose residual stream leaves fp16 in its second layer, as Gemma-3's does."""
    folder = tmp_path_factory.mktemp("gemma")
    path = tiny_model(folder, "gemma3_text")
    weights = load_file(folder / "model.safetensors")
    for name, x in weights.items():
        if "layers.1.post_feedforward_layernorm" in name:
            x.add_(6e4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("key", ["teacher", "teachers"])
def test_a_teacher_that_overflows_ends_the_run_before_its_first_update(
    rooms: Path, tmp_path: Path, gemma: str, key: str
) -> None:
    teacher = {"kind": "dual_encoder", "path": gemma, "dtype": "fp16", "query_length": 20, "passage_length": 20}
    tree: dict[str, Any] = settings(rooms, tmp_path / "run", train={"steps": 1, "batch_size": 2, "save_every": 1})
    tree |= {"teacher": teacher, "losses": {"layer": {"weight": 0}}}
    place = "teacher"
    if key == "teachers":
        other = {**teacher, "path": str(rooms / "llama"), "dtype": "fp32"}
        tree |= {"teachers": [other, teacher]}
        del tree["teacher"]
        place = r"teachers\.1"
    with pytest.raises(InputError, match=rf"^{place}\.dtype: is float16, .*not finite, from its layer 1 on") as caught:
        distill(parse_section(Config, tree, "x.yaml"), quiet=True)
    assert "dtype=bf16" in str(caught.value)
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    if key == "teacher":
        teacher["dtype"] = "bf16"
        assert (distill(parse_section(Config, tree, "x.yaml"), quiet=True) / "config.json").exists()


def test_auto_is_what_the_checkpoint_was_published_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, path = torch.device("cuda"), save_bert(tmp_path / "bert", layers=1, width=16)
    config = json.loads((path / "config.json").read_text())
    for named, has, dtype, serves in (
        ("bfloat16", True, torch.bfloat16, torch.bfloat16),
        ("bfloat16", False, torch.float16, torch.float32),
        ("float16", True, torch.float16, torch.float16),
        ("float32", True, torch.float16, torch.float32),
        (None, True, torch.float16, torch.float32),
    ):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has, **_: has)
        tree = {key: x for key, x in config.items() if key not in ("dtype", "torch_dtype")}
        (path / "config.json").write_text(json.dumps(tree | ({"torch_dtype": named} if named else {})))
        assert published_in(str(path)) == (named or "float32")  # its weights say so
        assert half_of(str(path), gpu) == dtype
        assert served_in(str(path), gpu, generates=False) == serves
        assert served_in(str(path), gpu, generates=True) == dtype
        assert served_in(str(path), torch.device("cpu"), generates=True) == torch.float32
        assert teacher_dtype(TeacherConfig(kind="dual_encoder", path=str(path)), gpu) == dtype
    assert half_of(str(path), torch.device("cpu")) == torch.bfloat16
    assert teacher_dtype(TeacherConfig(kind="dual_encoder", path=str(path), dtype="fp32"), gpu) == torch.float32


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_means_of_16_bits_are_taken_in_float32(tmp_path: Path, dtype: str) -> None:
    scorer, _ = load_scorer(str(save_bert(tmp_path, layers=1, width=16)), settings=["pooling=mean", f"dtype={dtype}"])
    states_BLD = 500 + torch.rand(2, 400, 16).to(next(scorer.parameters()).dtype)  # their sum is beyond fp16
    mask_BL = torch.ones(2, 400, dtype=torch.long)
    expected = states_BLD.double().mean(1)
    got = scorer._pool(states_BLD, mask_BL)
    assert got.dtype == states_BLD.dtype
    assert torch.allclose(got.double(), expected, rtol=2**-8 if dtype == "bf16" else 2**-11)
