"""A dual encoder as one ONNX graph, or its int8 form: from token ids to the vector that is served.

Dimensions: B texts, L tokens, W width of the states, D width of the vectors.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lead_ds.data.tokens.encoder import TextEncoder
from lead_ds.errors import LeadError, RunError
from lead_ds.io.located import find_file
from lead_ds.models.files import RECORD
from lead_ds.models.load import load_encoder
from lead_ds.models.onnx_file import VECTOR, OnnxEncoder, require, write_probes
from lead_ds.models.quiet import quiet
from lead_ds.models.student_dir import vacant, whole_folder, write_student
from lead_ds.models.vector_encoder import VectorEncoder
from lead_ds.models.vocabulary import check_vocabulary, check_weights

OPSET = 17  # the first with LayerNormalization; every onnxruntime since 1.12 runs it
MODEL = "onnx/model.onnx"  # where sentence-transformers looks
STATES = "last_hidden_state"
TOLERANCE = 1e-4
INT8_COSINE = 0.9  # mean cosine to the original below which an int8 model is refused: activations with outliers do that
CHECK_BATCHES = (1, 2, 5)  # sizes of the checked batches, in turns; the graph was traced with another

_PARAGRAPH = (
    "A bi-encoder reads the question and the passage apart, so the passages of a whole collection can be read once, "
    "before anyone asks. What it pays for this is interaction: no word of the question ever meets a word of the passage. "
    "Late interaction keeps one vector for each token and lets them meet at the very end; a cross-encoder lets them meet "
    "in every layer, and is therefore far too slow to read 8,841,823 passages. Naïve users (and 検索 engines) want both."
)


@dataclass(frozen=True)
class Exported:
    """What came of an export: the model's file and bytes, the original weights' bytes, and how far the vectors moved.

    difference: the largest of any component, relative to the vector's largest one where that is above 1.
    """

    path: Path
    bytes: int
    original_bytes: int
    difference: float
    least_cosine: float
    mean_cosine: float


def export_onnx(
    path: str, out: str | Path, *, int8: bool = False, settings: Sequence[str] = (), texts: Sequence[str] = ()
) -> Exported:
    """Write the dual encoder in `path` to the folder `out` as ONNX, whole or not at all, and compare its vectors with torch's.

    Inputs input_ids, attention_mask and where the model has them token_type_ids, int64 [B, L]; outputs
    last_hidden_state [B, L, W] and sentence_embedding [B, D] (pooled, Dense, normalised). Beside it stand the tokenizer and what
    sentence-transformers reads with `backend="onnx"`. int8: weights quantised to 7 bits, so that no
    CPU's products saturate, with a scale for each output. Activations to 8 bits as they come (dynamic quantisation).
    settings: `key=value` of the model. texts: compared in addition to the built-in ones. Raises InputError for a model that is
    not a dual encoder, a folder that is not empty, packages that are missing. Raises RunError where the model cannot be traced,
    or its vectors differ from torch's by more than TOLERANCE. Of int8: where their mean cosine to them is below INT8_COSINE.
    """
    for package in ("onnx", "onnxruntime"):
        require(package)
    out = vacant(out)
    scorer, encoder = load_encoder(path, settings)
    check_weights(scorer, encoder, path)
    check_vocabulary(scorer, encoder, path)
    scorer.refuse_sparse(path, "an ONNX file of ours gives dense ones")
    with whole_folder(out) as made:
        _write_folder(scorer, encoder, made, path, settings)
        original = 0
        for weights in made.glob("model*.safetensors*"):
            original += weights.stat().st_size
            weights.unlink()
        file = made / MODEL
        _trace(scorer, encoder, file)
        if int8:
            _quantise(file)
        texts = [*check_texts(encoder.passage_length), *texts]
        with (made / "README.md").open("a", encoding="utf-8") as card:
            card.write(_USE.format(what="int8 ONNX" if int8 else "ONNX"))
        moved = compare(scorer, OnnxEncoder(file, checked=False), encoder, texts)
        if not int8 and moved[0] > TOLERANCE:
            what = f"onnxruntime's vectors differ from torch's by {moved[0]:.1e}, more than {TOLERANCE:.0e}"
            raise RunError(path, what, "its architecture cannot be exported with this torch")
        if int8 and not moved[2] >= INT8_COSINE:
            what = f"its int8 vectors keep a mean cosine of {moved[2]:.3f} to the original, less than {INT8_COSINE}"
            raise RunError(path, what, "its activations cannot be held in 8 bits; use --to onnx")
        probes = encoder.passages(texts[1:9])
        with torch.no_grad():
            write_probes(file, probes, scorer.embed(probes))
        OnnxEncoder(file)
        size = sum(part.stat().st_size for part in file.parent.iterdir())
    return Exported(out / MODEL, size, original, *moved)


def export_sentence_transformers(
    path: str, out: str | Path, *, settings: Sequence[str] = (), texts: Sequence[str] = ()
) -> Exported:
    """Write the dual encoder in `path` to the folder `out` as sentence-transformers keeps one, whole or not at all.

    Raises as `export_onnx`.
    """
    out = vacant(out)
    scorer, encoder = load_encoder(path, settings)
    check_weights(scorer, encoder, path)
    with whole_folder(out) as made:
        _write_folder(scorer, encoder, made, path, settings)
        again, read = load_encoder(str(made))
        moved = compare(scorer, again, read, [*check_texts(encoder.passage_length), *texts])
        if moved[0] > TOLERANCE:
            raise RunError(path, f"read back, its vectors differ by {moved[0]:.1e}", "keep the original")
        size = sum(file.stat().st_size for file in made.glob("model*.safetensors"))
    return Exported(out, size, size, *moved)


def compare(
    scorer: VectorEncoder, other: VectorEncoder | OnnxEncoder, encoder: TextEncoder, texts: Sequence[str]
) -> tuple[float, float, float]:
    """How far the vectors of `other` are from the scorer's: `Exported`'s difference, least and mean cosine.

    Texts are read in batches of several sizes, so that lengths and padding vary.
    """
    differences: list[float] = []
    cosines: list[Tensor] = []
    start = 0
    while start < len(texts):
        size = CHECK_BATCHES[len(differences) % len(CHECK_BATCHES)]
        tokens = encoder.passages(texts[start : start + size])
        with torch.no_grad():
            ours_BD, theirs_BD = scorer.embed(tokens).double(), other.embed(tokens).double()
        scale = ours_BD.abs().max().clamp_min(1.0)
        differences.append(float((ours_BD - theirs_BD).abs().max() / scale))
        cosines.append(nn.functional.cosine_similarity(ours_BD, theirs_BD))
        start += size
    joined = torch.cat(cosines)
    difference = max(differences) if all(x == x for x in differences) else float("inf")  # max() overlooks NaN
    return difference, float(joined.min()), float(joined.mean())


def check_texts(length: int) -> list[str]:
    """Texts of one word up to what `length` tokens hold."""
    words = _PARAGRAPH.split()
    words *= 1 + length // len(words)
    counts = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377]
    return ["", *(" ".join(words[i : i + n]) for i, n in enumerate(counts) if n < 2 * length)]


class _Served(nn.Module):
    """What the graph computes."""

    def __init__(self, scorer: VectorEncoder, inputs: Sequence[str]) -> None:
        super().__init__()
        self.scorer, self.inputs = scorer, inputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        tokens = dict(zip(self.inputs, tensors, strict=True))
        [states_BLW] = self.scorer.run(tokens, (), lambda state: state, through_norm=True)
        return states_BLW, self.scorer.vectors_of(states_BLW, tokens["attention_mask"])


def _trace(scorer: VectorEncoder, encoder: TextEncoder, file: Path) -> None:
    tokens = encoder.passages(["three texts", "of several lengths", "so that one of them is padded and the others are"])
    inputs = list(tokens)
    axes = {name: {0: "batch", 1: "length"} for name in (*inputs, STATES)} | {VECTOR: {0: "batch"}}
    file.parent.mkdir(parents=True)
    try:
        # The exporter by tracing: it needs no package beside torch, and whether it caught every case is checked afterwards.
        with warnings.catch_warnings(), torch.no_grad(), quiet():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Served(scorer, inputs).eval(),  # or the exporter would leave the scorer in training mode
                tuple(tokens.values()),
                str(file),
                input_names=inputs,
                output_names=[STATES, VECTOR],
                dynamic_axes=axes,
                opset_version=OPSET,
                dynamo=False,
            )
    except (MemoryError, OSError, LeadError):
        raise
    except Exception as error:  # an exporter fails in any way it likes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(scorer.config.path, f"cannot be traced to ONNX: {reason[:200]}", "try another torch") from error
    if len(list(file.parent.iterdir())) > 1:
        _join(file)


def _join(file: Path) -> None:
    """Beyond the 2 GB of one protobuf torch writes a file per tensor: gather them in one, beside the graph."""
    onnx = require("onnx")
    graph = onnx.load(str(file))
    for part in file.parent.iterdir():
        part.unlink()
    onnx.save_model(graph, str(file), save_as_external_data=True, location=f"{file.name}_data")


def _quantise(file: Path) -> None:
    import logging

    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().setLevel(max(logging.getLogger().level, logging.ERROR))  # it advises, on the root logger
    whole = file.with_name("float32.onnx")
    external = file.with_name(f"{file.name}_data").exists()
    file.rename(whole)
    # The reduced range keeps weights within MOST_WEIGHT. A scale for each output makes up for most of the lost bit.
    quantize_dynamic(
        str(whole),
        str(file),
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=True,
        use_external_data_format=external,
    )
    kept = {file.name, f"{file.name}.data"}
    for part in file.parent.iterdir():
        if part.name not in kept:
            part.unlink()


def _write_folder(
    scorer: VectorEncoder, encoder: TextEncoder, folder: Path, path: str, settings: Sequence[str]
) -> None:
    """The model's directory; its own card, and its record where no setting changes it, stay as they are."""
    card, record = (find_file(path, name) for name in ("README.md", RECORD))
    write_student(scorer, encoder, folder, scorer.state_dict(), card.read_text("utf-8") if card else None)
    if record is not None and not settings:
        (folder / RECORD).write_bytes(record.read_bytes())


_USE = """
## {what}

`onnx/model.onnx` takes input_ids, attention_mask (and token_type_ids where the tokenizer gives them) and returns the finished
vectors as `sentence_embedding`:

```python
import onnxruntime
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this directory")
session = onnxruntime.InferenceSession("this directory/onnx/model.onnx")
tokens = tokenizer(["a text"], padding=True, return_tensors="np")
wanted = {{x.name: tokens[x.name] for x in session.get_inputs()}}
[vectors] = session.run(["sentence_embedding"], wanted)
```

With optimum installed, `SentenceTransformer("this directory", backend="onnx")` loads it too. The file's metadata hold a few
texts with their vectors; `lead_ds.models.onnx_file.OnnxEncoder(file)` refuses it on a CPU that gives others.
"""
