"""The plan against real models, a real AdamW and real DeepSpeed engines: parameters and optimizer state to the byte."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

from lead_ds.cli import operations
from lead_ds.config import Config, StudentConfig, TeacherConfig
from lead_ds.engine.distributed.deepspeed_files import read_deepspeed_config
from lead_ds.models.load import load_student, load_teacher
from lead_ds.plan import Cluster, make_plan, student_memory, teacher_memory
from lead_ds.plan import requirements as found
from lead_ds.plan.activations import Ledger, _fused_attention, forward_bytes
from lead_ds.plan.advice import describe
from tests.helpers.deepspeed_files import filled_teacher
from tests.helpers.launch import launch
from tests.plan.engine_bytes import settings

BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 30,
    "intermediate_size": 53,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 101,
    "max_position_embeddings": 33,
}
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
TINY_MISTRAL = {**MISTRAL_7B, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "vocab_size": 99}
TINY_MISTRAL |= {"num_hidden_layers": 3, "num_key_value_heads": 2, "max_position_embeddings": 64}


NO_TEACHER = {"losses": {"response": {"weight": 0.0}, "layer": {"weight": 0.0}}}


def shaped(folder: Path, config: dict[str, Any]) -> str:
    """A model folder that holds a config.json and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def bert(tmp_path: Path) -> str:
    return shaped(tmp_path / "bert", BERT)


def test_7b_from_its_configuration_alone(tmp_path: Path, bert: str) -> None:
    path = shaped(tmp_path / "mistral", MISTRAL_7B)
    run = tmp_path / "run.yaml"
    tree = {
        "teacher": {"kind": "dual_encoder", "path": path, "query_length": 8, "passage_length": 16},
        "student": {"path": bert, "query_length": 8, "passage_length": 16},
        "data": {"path": "data"},
        "train": {"batch_size": 4},
    }
    run.write_text(yaml.safe_dump(tree))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    done = invoke("plan", str(run), "--gpus", "8", "--gpu-memory", "80", "--json", "--write", str(tmp_path / "ds"))
    assert done.exit_code == 0, done.output
    plan = json.loads(done.output)
    assert plan["models"]["teacher"]["parameters"] == 7_241_732_096  # as published
    assert plan["models"]["teacher"]["held_parameters"] == 7_241_732_096 - 32000 * 4096  # no language-model head
    parts = {p["placement"]: p["parts"] for p in plan["placements"]}
    assert parts["replicate"]["teacher shard"] == 2 * 7_110_660_096
    assert parts["zero3"]["teacher shard"] == 2 * 7_110_660_096 // 8  # every parameter divides by eight
    assert parts["zero3+cpu"]["teacher shard"] == 0
    assert next(p for p in plan["placements"] if p["placement"] == "zero3+cpu")["host"] == 2 * 7_110_660_096
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2_000_000  # KiB: no weights were made


@pytest.mark.parametrize(
    ("kind", "config", "more"),
    [
        ("dual_encoder", BERT, {"projection": 10}),
        ("dual_encoder", TINY_MISTRAL, {}),
        ("colbert", BERT, {"token_dim": 8}),
        ("cross_encoder", {**BERT, "architectures": ["BertForSequenceClassification"], "num_labels": 1}, {}),
    ],
)
def test_parameters_are_those_of_the_loaded_model(
    tmp_path: Path, kind: str, config: dict[str, Any], more: dict[str, Any]
) -> None:
    path = shaped(tmp_path / "model", config)
    for made, load in ((TeacherConfig, load_teacher), (StudentConfig, load_student)):
        fields: dict[str, Any] = {"kind": kind, "path": path, "weights": "random", **more}
        model = made(**fields)
        _, shape = found.meta_model(model, "student" if made is StudentConfig else "teacher")
        real = load(model, torch.float32)
        assert shape.numel == sum(p.numel() for p in real.parameters())
        if made is StudentConfig:
            assert shape.trainable == sum(p.numel() for p in real.parameters() if p.requires_grad)
        else:
            assert shape.trainable == 0
        assert shape.layers == real.num_layers


def test_dense_layers_saved_beside_the_weights_count(tmp_path: Path) -> None:
    path = Path(shaped(tmp_path / "model", BERT))
    _, plain = found.meta_model(StudentConfig(path=str(path)), "student")
    modules = [{"type": "sentence_transformers.models.Transformer", "path": ""}]
    modules += [{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]
    modules += [{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]
    modules = [{"idx": i, "name": str(i), **module} for i, module in enumerate(modules)]
    (path / "modules.json").write_text(json.dumps(modules))
    for name, content in (
        ("1_Pooling", {"word_embedding_dimension": 30, "pooling_mode_cls_token": True}),
        ("2_Dense", {"in_features": 30, "out_features": 12}),
    ):
        (path / name).mkdir()
        (path / name / "config.json").write_text(json.dumps(content))
    _, shape = found.meta_model(StudentConfig(path=str(path)), "student")
    assert shape.numel == plain.numel + 30 * 12 + 12
    assert shape.features == 12


def test_adamw_state_to_the_byte(bert: str) -> None:
    config = StudentConfig(path=bert, weights="random")
    _, shape = found.meta_model(config, "student")
    model = load_student(config, torch.float32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    real = sum(x.nbytes for state in optimizer.state.values() for x in state.values() if x.dim())
    planned = student_memory([shape], {"stage": 0}, 4, 1)
    assert planned.moments == real
    assert planned.parameters == sum(p.nbytes for p in model.parameters())
    assert planned.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        (1, "bf16"),
        pytest.param(3, "bf16", marks=pytest.mark.slow),
        pytest.param(0, "bf16", marks=pytest.mark.slow),
        pytest.param(0, "fp32", marks=pytest.mark.slow),
        pytest.param(1, "fp32", marks=pytest.mark.slow),
        pytest.param(2, "bf16", marks=pytest.mark.slow),
        pytest.param(3, "fp32", marks=pytest.mark.slow),
    ],
)
def test_deepspeed_engine_state_to_the_byte(bert: str, stage: int, dtype: str) -> None:
    real = launch("tests.plan.engine_bytes:student", 2, path=bert, stage=stage, dtype=dtype)
    _, shape = found.meta_model(settings(bert, stage).student, "student")
    zero = read_deepspeed_config(f"ds_configs/student_zero{stage}.json")["zero_optimization"]
    planned = student_memory([shape], zero, {"fp32": 4, "bf16": 2}[dtype], 2)
    for rank in real:
        assert rank == {"parameters": planned.parameters, "master": planned.master, "moments": planned.moments}


@pytest.mark.parametrize("max_live", [10**9, 6_000, "auto", 1])
def test_sharded_teacher_to_the_byte(bert: str, max_live: int | str) -> None:
    real = launch("tests.plan.engine_bytes:teacher", 2, path=bert, max_live=max_live)
    config = settings(bert, 1, teacher=True)
    assert config.teacher is not None
    _, shape = found.meta_model(config.teacher, "teacher")
    zero = read_deepspeed_config("ds_configs/teacher_zero3.json")["zero_optimization"]
    planned = teacher_memory(shape, "zero3", zero | {"stage3_max_live_parameters": max_live}, 2, 2, 2)
    for rank in real:
        assert rank["shard"] == planned.shard
        assert rank["resident"] == 2 * sum(p.numel for p in shape.parameters if p.numel <= 10 * 30)
        # The last of a prefetch may be the largest matrix, or not.
        assert planned.gathered - 2 * shape.largest_gather <= rank["gathered"] <= planned.gathered


def test_activations_without_data_are_those_with(bert: str) -> None:
    config = StudentConfig(path=bert, weights="random", attention="sdpa")
    backbone, _ = found.meta_model(config, "student")
    real = load_student(config, torch.bfloat16).backbone
    known = {x.untyped_storage()._cdata for x in (*real.parameters(), *real.buffers())}
    ids = torch.ones(4, 16, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, -4:] = 0  # without padding, transformers makes no attention mask: a batch of texts has some
    inputs = {"input_ids": ids, "attention_mask": mask}
    with _fused_attention(), Ledger(known) as ledger:
        kept = real(**inputs).last_hidden_state
    assert kept.requires_grad
    planned = forward_bytes(backbone, [(4, 16)], training=True)
    assert planned == ledger.peak
    # Rows in proportion, but for what does not depend on them (position ids).
    assert forward_bytes(backbone, [(40, 16)], training=True) == pytest.approx(10 * planned, rel=0.01)
    checkpointed = forward_bytes(backbone, [(4, 16)], training=True, checkpointing=True)
    assert forward_bytes(backbone, [(4, 16)], training=False) < checkpointed < planned


def test_grad_cache_keeps_the_activations_of_its_queries(bert: str) -> None:
    student = {"path": bert, "query_length": 9, "passage_length": 33}

    def activations(**train: int) -> int:
        config = Config.model_validate({"student": student, "data": {"path": "-"}, "train": train} | NO_TEACHER)
        return found.requirements(config).student_activations(False)

    assert activations(batch_size=64, grad_cache=2) == activations(batch_size=2) < activations(batch_size=64) / 20


def test_passes_are_counted_as_they_run(bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {
        "teacher": {"kind": "dual_encoder", "path": bert, "query_length": 16, "passage_length": 32},
        "student": {"path": bert, "query_length": 16, "passage_length": 32},
        "data": {"path": "-", "negatives": 7},
    }
    seen: list[list[tuple[int, int]]] = []

    def counted(backbone: Any, texts: list[tuple[int, int]], **how: Any) -> int:
        seen.append(texts)
        return forward_bytes(backbone, texts, **how)

    monkeypatch.setattr("lead_ds.plan.requirements.forward_bytes", counted)

    def planned(passes: int | str | None) -> int:
        config = Config.model_validate({**tree, "teacher": {**tree["teacher"], "passes": passes}})
        return found.requirements(config).teachers[0].activations(64)

    apart, packed, four = planned(None), planned("packed"), planned(4)
    # 64 queries of 16 tokens and 512 passages of 32: as many tokens as 544 rows of 32.
    assert seen == [[(64, 16), (512, 32)], [(544, 32)], [(136, 32)] * 4]
    assert four < apart < packed
    assert packed == pytest.approx(4 * four, rel=0.01)


@pytest.mark.parametrize("kind", ["dual_encoder", "llm_reranker"])
def test_a_teacher_is_counted_as_deep_as_it_is_loaded(tmp_path: Path, bert: str, kind: str) -> None:
    deep = {**TINY_MISTRAL, "num_hidden_layers": 12}
    path, shallow = shaped(tmp_path / "deep", deep), shaped(tmp_path / "shallow", {**deep, "num_hidden_layers": 3})
    layer = {"select": "given", "teacher_layers": [0, 2], "student_layers": [0, 2]}
    lengths = {"max_length": 256} if kind == "llm_reranker" else {"query_length": 32, "passage_length": 128}
    tree: dict[str, Any] = {
        "teacher": {"kind": kind, "path": path, **lengths},
        "student": {"path": bert, "query_length": 8, "passage_length": 16},
        "data": {"path": "data"},
        "losses": {"response": {"weight": 0.0}, "layer": layer},
    }

    def planned(**teacher: Any) -> tuple[Any, int, list[str]]:
        r = found.requirements(Config.model_validate({**tree, "teacher": {**tree["teacher"], **teacher}}))
        made = make_plan(r, Cluster(8, 1, 80 * 10**9))
        return r.teachers[0].shape, r.teachers[0].activations(4), describe(made)

    whole, more, told = planned(truncate=False)
    assert (whole.layers, whole.published_layers) == (12, 12)
    assert "12 layers" in told[1]
    cut, less, told = planned()
    three, same, _ = planned(path=shallow)
    assert (cut.layers, cut.published_layers) == (3, 12)
    assert cut.published == whole.published
    assert "3 of 12 layers" in told[1]
    assert cut.parameters == three.parameters
    assert less == same <= more
    assert planned(train=True)[0].layers == 12, "it is trained whole"
    tree["losses"]["response"] = {"weight": 1.0}
    assert planned()[0].layers == 12, "the final relevance needs every layer"


def test_recommendation_follows_the_memory(tmp_path: Path, bert: str) -> None:
    path = shaped(tmp_path / "mistral", {**MISTRAL_7B, "num_hidden_layers": 8})  # 1.9 B parameters
    config = Config.model_validate(
        {
            "teacher": {"kind": "dual_encoder", "path": path, "query_length": 8, "passage_length": 16},
            "student": {"path": bert, "query_length": 8, "passage_length": 16},
            "data": {"path": "data", "negatives": 1},
            "train": {"batch_size": 2},
        }
    )
    requirements = found.requirements(config)

    def recommended(memory: float, gpus: int = 8, host: float | None = None) -> str | None:
        room = None if host is None else int(host * 1e9)
        plan = make_plan(requirements, Cluster(gpus, 1, int(memory * 1e9), room))
        if plan.recommended is None:
            return None
        assert plan.recommended.total <= memory * 1e9
        return plan.recommended.choice.placement

    assert recommended(80) == "replicate"
    assert recommended(4) == "zero3"
    assert recommended(3.2, gpus=1) == "zero3+cpu"
    assert recommended(3.2, gpus=1, host=3.5) == "zero3+nvme"
    assert recommended(1) is None


def test_written_configurations_are_those_of_the_choice(tmp_path: Path, bert: str) -> None:
    run = tmp_path / "run.yaml"
    path = shaped(tmp_path / "mistral", {**MISTRAL_7B, "num_hidden_layers": 8})
    tree = {
        "teacher": {"kind": "dual_encoder", "path": path, "query_length": 8, "passage_length": 16},
        "data": {"path": "data"},
    }
    tree |= {"student": {"path": bert, "query_length": 8, "passage_length": 16}, "train": {"batch_size": 2}}
    run.write_text(yaml.safe_dump(tree))
    done = invoke("plan", str(run), "--gpus", "8", "--gpu-memory", "4", "--write", str(tmp_path / "ds"))
    assert done.exit_code == 0, done.output
    assert "teacher zero3" in done.output
    assert "teacher.placement=zero3" in done.output
    filled = filled_teacher(str(tmp_path / "ds" / "teacher.json"), hidden=4096, local_world=8)
    assert filled["zero_optimization"]["stage"] == 3
    assert "auto" not in json.dumps(filled)
    assert read_deepspeed_config(str(tmp_path / "ds" / "student.json"))["zero_optimization"]["stage"] == 1

    assert invoke("plan", str(run), "--gpu-memory", "1").exit_code == 1


def invoke(*arguments: str) -> Any:
    app = typer.Typer(pretty_exceptions_enable=False)
    operations.add_commands(app)
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)
