"""An exported ONNX file: loaded on the CPU at hand, and checked against the vectors that its writer got.

CPUs with AVX2 or AVX-512 but no VNNI add pairs of u8 x s8 products in saturating 16 bits. Weights are written so small that no
pair can saturate (`MOST_WEIGHT`); and every file carries a few texts with their vectors, compared when it loads.

Dimensions: B texts, D width of the vectors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lead_ds.data.tokens.encoder import Tokens
from lead_ds.errors import InputError

VECTOR = "sentence_embedding"
PROBES = "lead_ds.probes"  # the metadata's key: inputs, vectors and how far these may move
MOST_WEIGHT = 64  # of an 8-bit weight: 2 x 255 x 64 = 32,640 fits 16 bits, 2 x 255 x 127 does not
LEAST_DRIFT = 1e-4  # 1 - cosine that is not a difference, however exact the file: float32 sums in another order


class OnnxEncoder:
    """An exported model in onnxruntime, on the CPU, with torch's number of threads.

    checked: compare the vectors of the texts that `write_probes` left in the file first. Raises InputError for a file without
    them, and for one that gives other vectors on this CPU than on its writer's.
    """

    def __init__(self, file: Path, *, checked: bool = True) -> None:
        onnxruntime = require("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.inputs = [x.name for x in self._session.get_inputs()]
        if checked:
            self._check(file, self._session.get_modelmeta().custom_metadata_map.get(PROBES))

    def embed(self, tokens: Tokens) -> Tensor:
        """Final vectors [B, D] of texts, as `DualEncoder.embed`."""
        [vectors_BD] = self._session.run([VECTOR], {name: tokens[name].cpu().numpy() for name in self.inputs})
        return torch.from_numpy(vectors_BD)

    def _check(self, file: Path, note: str | None) -> None:
        if note is None:
            raise InputError(file, "holds no texts to check its vectors by", "export it again with this version")
        probes = json.loads(note)
        tokens = {name: torch.tensor(rows, dtype=torch.int64) for name, rows in probes["inputs"].items()}
        cosine = _mean_cosine(self.embed(tokens), torch.tensor(probes["vectors"]))
        least = 1 - probes["drift"]
        if not cosine >= least:  # NaN included
            what = (
                f"gives other vectors on this CPU than on its writer's: their cosine is {cosine:.4f}, not {least:.4f}"
            )
            raise InputError(file, what, "export it again with this version, or with --to onnx")


def write_probes(file: Path, tokens: Tokens, original_BD: Tensor) -> None:
    """Note in the file's metadata what it makes of `tokens` on this CPU, and how far that may move on another.

    original_BD: what the exported model makes of them. Float sums in another order round some activations otherwise to 8 bits.
    That moves the vectors less than 8 bits as such did: the bound is the distance to the original, or LEAST_DRIFT.
    """
    onnx = require("onnx")
    encoder = OnnxEncoder(file, checked=False)
    vectors_BD = encoder.embed(tokens)
    probes = {
        "inputs": {name: tokens[name].tolist() for name in encoder.inputs},
        "vectors": vectors_BD.tolist(),
        "drift": max(LEAST_DRIFT, 1 - _mean_cosine(vectors_BD, original_BD)),
    }
    graph = onnx.load(str(file), load_external_data=False)
    kept = {x.key: x.value for x in graph.metadata_props}
    onnx.helper.set_model_props(graph, {**kept, PROBES: json.dumps(probes)})
    onnx.save_model(graph, str(file))


def require(package: str) -> Any:
    """The imported package. Raises InputError with how to install it."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError:
        raise InputError(package, "the package is not installed", 'pip install "lead-ds[onnx]"') from None


def _mean_cosine(ours_BD: Tensor, theirs_BD: Tensor) -> float:
    return float(nn.functional.cosine_similarity(ours_BD.double(), theirs_BD.double()).mean())
