"""Exports on an emulated CPU with AVX2 and no VNNI, where 8-bit products can saturate: the CPU at hand may hide it."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lead_ds.models import export

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

QEMU = shutil.which("qemu-x86_64")
LOAD = """
import json, sys
from pathlib import Path
from lead_ds.errors import InputError
from lead_ds.models.onnx_file import OnnxEncoder

said = []
for file in sys.argv[1:]:
    try:
        OnnxEncoder(Path(file))
        said.append("loaded")
    except InputError as error:
        said.append(str(error))
print(json.dumps(said))
"""


@pytest.mark.slow
@pytest.mark.skipif(QEMU is None or platform.machine() != "x86_64", reason="needs qemu-user on x86-64")
def test_int8_gives_the_same_vectors_and_8_bit_weights_are_refused(rooms: Path, tmp_path: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    student = str(rooms / "student")
    whole = export.export_onnx(student, tmp_path / "float32").path
    seven = export.export_onnx(student, tmp_path / "int8", int8=True).path
    eight = tmp_path / "eight.onnx"
    quantize_dynamic(str(whole), str(eight), weight_type=QuantType.QInt8, per_channel=True)
    graph = onnx.load(str(eight))
    onnx.helper.set_model_props(graph, {x.key: x.value for x in onnx.load(str(seven)).metadata_props})
    onnx.save_model(graph, str(eight))
    command = [str(QEMU), "-cpu", "Haswell", sys.executable, "-c", LOAD, *map(str, (whole, seven, eight))]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert said[:2] == ["loaded", "loaded"]
    assert "gives other vectors on this CPU than on its writer's" in said[2]
