"""Models whose weights or code are not those of a plain transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lead_ds.config import StudentConfig, TeacherConfig
from lead_ds.data.reads import ModelBatch
from lead_ds.errors import InputError
from lead_ds.models.load import load_encoder, load_student, load_teacher, load_text
from lead_ds.models.special_weights import check_trainable, keep_experts_together
from lead_ds.models.student_dir import save_student
from tests.formats.format import change, put
from tests.formats.formats import FORMATS
from tests.formats.vectors import static, with_code
from tests.models.tiny_models import tiny_model

TEXTS = ["which thing has three hearts", "the octopus", ""]


def test_a_static_student_learns_and_is_saved_as_it_was(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    config = StudentConfig(path=static(tmp_path), projection=8, normalize=True, query_length=20, passage_length=20)
    student, encoder = load_student(config, torch.float32), load_text(config)
    assert (student.num_layers, student.has_layers, student.features_width) == (1, False, 8)
    batch = ModelBatch(group_size=1, queries=encoder.queries(TEXTS), passages=encoder.passages(TEXTS))
    student(batch).final.relevance().logits.square().sum().backward()
    assert student.model.embedding.weight.grad.abs().sum() > 0
    folder = save_student(student.eval(), encoder, tmp_path / "student")
    with torch.no_grad():
        ours = student.embed(encoder.passages(TEXTS))
        again, read = load_encoder(folder)
        torch.testing.assert_close(again.embed(read.passages(TEXTS)), ours, rtol=0, atol=0)
    theirs = SentenceTransformer(str(folder), device="cpu").encode_document(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(theirs.clone(), ours, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="is the mean of its tokens"):
        load_student(StudentConfig(path=config.path, pooling="cls"), torch.float32)


def test_finished_vectors_have_no_layers(tmp_path: Path) -> None:
    path = with_code(tmp_path, 'return {"sentence_embeddings": super().forward(*args, **more).last_hidden_state[:, 0]}')
    config = TeacherConfig(kind="dual_encoder", path=path, trust_remote_code=True)
    teacher, encoder = load_teacher(config, torch.float32), load_text(config)
    assert (teacher.has_layers, teacher.num_layers, teacher.pooling) == (False, 0, "by its own code")
    batch = ModelBatch(group_size=1, queries=encoder.queries(TEXTS), passages=encoder.passages(TEXTS))
    with torch.no_grad():
        assert teacher(batch).final.relevance().logits.shape == (1, 3, 3)
        with pytest.raises(InputError, match="no layer can be read so"):
            teacher(batch, layers=[0])
    with pytest.raises(InputError, match="is a frozen teacher only"):
        load_student(StudentConfig(path=path, trust_remote_code=True), torch.float32)


def test_code_of_its_own_is_run_only_where_that_is_said(tmp_path: Path) -> None:
    path = with_code(tmp_path)
    own, native = (
        load_teacher(TeacherConfig(kind="dual_encoder", path=path, trust_remote_code=trusted), torch.float32)
        for trusted in (True, False)
    )
    assert type(own.model).__name__ == "Own"
    assert type(native.model).__name__ == "BertModel"
    with pytest.raises(InputError, match=r"comes with Python code.*set trust_remote_code: true .*or false"):
        load_text(TeacherConfig(kind="dual_encoder", path=path))
    change(path, "config.json", auto_map=None)
    put(path, "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own_code.Own", None]}})
    with pytest.raises(InputError, match=r"auto_map in tokenizer_config.json"):
        load_text(TeacherConfig(kind="dual_encoder", path=path))


def test_t5_keeps_its_first_layer(tmp_path: Path) -> None:
    path = FORMATS["sentence-t5, gtr: T5 encoder, mean, Dense"].write(tmp_path)
    assert load_student(StudentConfig(path=path, layers=[0, 2]), torch.float32).num_layers == 2
    with pytest.raises(InputError, match=r"let student.layers begin with 0"):
        load_student(StudentConfig(path=path, layers=[1, 2]), torch.float32)


def test_packed_rows_keep_no_count_of_a_prompt(tmp_path: Path) -> None:
    path = FORMATS["INSTRUCTOR: mean without the prompt"].write(tmp_path)
    with pytest.raises(InputError, match="passes: packed"):
        load_student(StudentConfig(path=path, passes="packed"), torch.float32)


class Block(nn.Module):
    """As models of code of their own have it: a list of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 2), nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


def test_zero3_gathers_the_experts_of_a_layer_as_one() -> None:
    from deepspeed.utils import z3_leaf_module

    model = nn.Sequential(nn.Linear(4, 4), Block(), Block())
    assert keep_experts_together(model) == ["Block"]
    assert [z3_leaf_module(module) for module in model] == [False, True, True]
    assert keep_experts_together(nn.Linear(4, 4)) == []


def test_quantised_weights_are_frozen(tmp_path: Path) -> None:
    import transformers

    shape: Any = transformers.AutoConfig.from_pretrained(tiny_model(tmp_path, "bert", layers=1))
    check_trainable(shape, "x")
    shape.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(InputError, match="cannot be trained"):
        check_trainable(shape, "x")
