"""Quantised teachers, read by the packages that wrote them: as transformers alone reads them, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from lead_ds.config import StudentConfig, TeacherConfig
from lead_ds.errors import InputError
from lead_ds.models.load import load_student, load_teacher
from tests.helpers.launch import launch
from tests.helpers.tiny import tiny_tokenizer
from tests.models.tiny_models import tiny_model, tokens_of

WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "layers": 2}
METHODS = ("bitsandbytes 8", "bitsandbytes 4", "torchao", "compressed-tensors")


def settings_of(method: str) -> Any:
    """What transformers quantises by as it loads. Skips where the package is missing."""
    package, _, bits = method.partition(" ")
    pytest.importorskip(package, reason=f"{package} is not installed: make test-quantised")
    if package == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    return transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})


def compressed(folder: Path) -> str:
    """A model whose weights are integers with a scale for each row, as vLLM's compressor writes them."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed: make test-quantised")
    file = Path(tiny_model(folder, "qwen3", **WIDE)) / "model.safetensors"
    found: dict[str, torch.Tensor] = {}
    for name, weight in load_file(file).items():
        if "_proj" in name:
            scale = weight.abs().amax(1, keepdim=True) / 127
            found[f"{name}_scale"] = scale
            weight = (weight / scale).round().to(torch.int8)
        found[name] = weight
    save_file(found, file, metadata={"format": "pt"})
    numbers = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": numbers, "input_activations": None, "output_activations": None}
    group["format"] = "int-quantized"
    how = {"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed"}
    change(folder, quantization_config={**how, "config_groups": {"group_0": group}, "ignore": []})
    return str(folder)


def change(folder: Path, **values: Any) -> None:
    """Set keys of config.json; None takes one out."""
    file = folder / "config.json"
    tree = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


def quantised(method: str, folder: Path) -> str:
    """A tiny model, quantised and saved by transformers."""
    if method == "compressed-tensors":
        return compressed(folder)
    how = settings_of(method)
    base = tiny_model(folder.with_name(f"{folder.name}-base"), "qwen3", **WIDE)
    model = transformers.AutoModel.from_pretrained(base, quantization_config=how, device_map="cpu")
    model.save_pretrained(folder)
    tiny_tokenizer(folder, "bpe")
    return str(folder)


@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_teacher_says_what_transformers_reads(tmp_path: Path, method: str) -> None:
    path = quantised(method, tmp_path / "model")
    tokens = tokens_of((7, 7, 7))  # no padding, on which numbers of bitsandbytes' 8 bits depend
    plain = transformers.AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    config = TeacherConfig(kind="dual_encoder", path=path, pooling="mean")
    ours = load_teacher(config, torch.float32).requires_grad_(False)
    with torch.no_grad():
        theirs = plain(**tokens, output_hidden_states=True)
        states = ours.run(tokens, [0], lambda state: state, through_norm=True)
        layer = plain.norm(theirs.hidden_states[1])
        torch.testing.assert_close(states[0], layer, rtol=0, atol=0)
        torch.testing.assert_close(states[-1], theirs.last_hidden_state, rtol=0, atol=0)
        first = load_teacher(config, torch.float32, 1).run(tokens, [0], lambda state: state, through_norm=True)
        torch.testing.assert_close(first[0], layer, rtol=0, atol=0)
    with pytest.raises(InputError, match="cannot be trained"):
        load_student(StudentConfig(path=path), torch.float32)


@pytest.mark.parametrize("method", METHODS)
def test_runs_with_a_quantised_teacher(tmp_path: Path, configure: Callable[..., Path], method: str) -> None:
    """Copied to two processes, where nothing says otherwise; and never sharded."""
    path = quantised(method, tmp_path / "model")
    teacher: dict[str, Any] = {"path": path, "pooling": "mean", "dtype": "auto"}
    configs = [
        configure(placement, extra_teacher={**teacher, "placement": placement}, train={"steps": 2, "batch_size": 2})
        for placement in ("auto", "zero3")
    ]
    for losses, refused in launch("tests.engine.jobs:distil_each", 2, configs=list(map(str, configs))):
        assert len(losses) == 2, losses
        assert "cannot be sharded (set placement: replicate)" in refused
    record = json.loads((Path(yaml.safe_load(configs[0].read_text())["output"]) / "run.json").read_text())
    assert '"replicate"' in json.dumps(record)


def test_eight_bit_floats_are_read_without_a_package(tmp_path: Path) -> None:
    """DeepSeek's form: blocks of 128 with a scale each. On a CPU transformers multiplies them out."""
    if torch.cuda.is_available():
        pytest.skip("on a GPU transformers computes in 8 bits")
    file = Path(tiny_model(tmp_path, "qwen3", **WIDE)) / "model.safetensors"
    found, whole = {}, load_file(file)
    for name, weight in whole.items():
        if "_proj" in name:
            blocks = weight.unflatten(0, (-1, 64)).unflatten(2, (-1, 64))
            scale = blocks.abs().amax((1, 3)) / 448
            found[f"{name}_scale_inv"] = scale
            spread = scale.repeat_interleave(64, 0).repeat_interleave(64, 1)
            found[name] = (weight / spread).to(torch.float8_e4m3fn)
            whole[name] = found[name].float() * spread
        else:
            found[name] = weight
    tokens = tokens_of((5, 9))
    model = transformers.AutoModel.from_pretrained(str(tmp_path)).eval()
    model.load_state_dict(whole)
    save_file(found, file, metadata={"format": "pt"})
    change(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]})
    config = TeacherConfig(kind="dual_encoder", path=str(tmp_path), pooling="mean")
    with torch.no_grad():
        states = load_teacher(config, torch.float32).run(tokens, [], lambda state: state, through_norm=True)
        kept = tokens["attention_mask"].bool()
        torch.testing.assert_close(states[-1][kept], model(**tokens).last_hidden_state[kept], rtol=0, atol=2e-5)
    change(tmp_path, quantization_config=None)
    with pytest.raises(InputError, match=r"quantised \(F8_E4M3\), and its config.json has no quantization_config"):
        load_teacher(config, torch.float32)


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ({"quant_method": "absent"}, r"quantised \(absent\): Unknown quantization type"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "pip install gptqmodel"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "optimum"),
        ({"quant_method": "aqlm"}, "pip install aqlm"),
        ({"bits": 4}, "no `quant_method`"),
    ],
)
def test_what_cannot_be_read_here_is_refused_in_one_line(tmp_path: Path, how: dict[str, Any], what: str) -> None:
    path = tiny_model(tmp_path, "qwen3", layers=1)
    change(tmp_path, quantization_config=how)
    with pytest.raises(InputError, match=what) as caught:
        load_teacher(TeacherConfig(kind="dual_encoder", path=path, pooling="mean"), torch.float32)
    assert "\n" not in str(caught.value)
