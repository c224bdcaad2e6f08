"""Uploading: what would go, and that nothing goes unasked. No network: the hub is a list that remembers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from lead_ds.cli.main import main
from lead_ds.errors import InputError, RunError
from lead_ds.models.upload import plan_upload, upload


class Hub:
    def __init__(self, fails: bool = False) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.fails = fails

    def create_repo(self, repo: str, **settings: Any) -> str:
        if self.fails:
            raise OSError("401 Client Error\nwith a page of text")
        self.calls.append((repo, settings))
        return f"https://hub/{repo}"

    def create_commit(self, repo: str, operations: list[Any], **settings: Any) -> None:
        self.calls.append((repo, {x.path_in_repo: Path(x.path_or_fileobj).read_bytes() for x in operations}))


@pytest.fixture
def student(rooms: Path, tmp_path: Path) -> Path:
    """A student with the things that lie about beside one."""
    folder = tmp_path / "student"
    shutil.copytree(rooms / "student", folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    for name in (
        "checkpoints/step-2/model.safetensors",
        "pytorch_model.bin",
        "optimizer.pt",
        ".env",
        "metrics.jsonl",
        "1_Pooling/config.json",
        "onnx/model.onnx",
        "onnx/model.onnx_data",
        ".cache/model.safetensors",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"12345")
    return folder


def test_only_the_model_goes(student: Path) -> None:
    planned = plan_upload(student, "me/model")
    assert {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "1_Pooling/config.json",
    } <= planned.files.keys()
    assert planned.files["onnx/model.onnx"] == planned.files["onnx/model.onnx_data"] == 5
    assert planned.left == [
        ".cache/model.safetensors",
        ".env",
        "checkpoints/step-2/model.safetensors",
        "metrics.jsonl",
        "optimizer.pt",
        "pytorch_model.bin",
    ]
    assert planned.bytes == sum((student / name).stat().st_size for name in planned.files)
    assert (planned.licence, planned.private) == ("apache-2.0", True)


def test_what_was_listed_is_what_goes(student: Path) -> None:
    planned, hub = plan_upload(student, "me/model"), Hub()
    assert upload(planned, hub) == "https://hub/me/model"
    (created, settings), (committed, sent) = hub.calls
    assert created == committed == "me/model"
    assert settings["private"] is True
    assert {name: len(content) for name, content in sent.items()} == planned.files
    plan = plan_upload(student, "me/model", private=False)
    upload(plan, hub)
    assert hub.calls[2][1]["private"] is False


def test_a_hub_that_refuses_is_told_in_one_line(student: Path) -> None:
    with pytest.raises(RunError, match=r"cannot be uploaded: 401 Client Error \("):
        upload(plan_upload(student, "me/model"), Hub(fails=True))


def test_without_the_flag_nothing_goes(
    student: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    command = ["push", "--model", str(student), "--repo", "me/model"]
    with pytest.raises(SystemExit) as exit:
        main(command)
    told = capsys.readouterr()
    assert exit.value.code == 2
    assert told.err.splitlines() == [
        "error: --yes-upload: was not given, so nothing was uploaded (add it to upload these files)"
    ]
    for words in ("model.safetensors", "to me/model, private", "licence: apache-2.0", "staying here: 6 files"):
        assert words in told.out
    assert hub.calls == []
    with pytest.raises(SystemExit) as exit:
        main([*command, "--yes-upload"])
    assert exit.value.code == 0
    assert len(hub.calls) == 2


@pytest.mark.parametrize(("repo", "says"), [("model", "names no owner"), ("a/b/c", "--repo"), ("me/../x", "--repo")])
def test_names_that_are_none(student: Path, repo: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        plan_upload(student, repo)


def test_folders_that_hold_no_model(rooms: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        plan_upload(tmp_path / "absent", "me/model")
    with pytest.raises(InputError, match="holds no model"):
        plan_upload(rooms / "data", "me/model")
    (tmp_path / "run" / "student").mkdir(parents=True)
    with pytest.raises(InputError, match="its model is in student/"):
        plan_upload(tmp_path / "run", "me/model")
    shutil.copytree(rooms / "student", tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").rename(tmp_path / "bare" / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickles never"):
        plan_upload(tmp_path / "bare", "me/model")
    (tmp_path / "bare" / "model.safetensors").write_bytes(b"")
    (tmp_path / "bare" / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(InputError, match="header is not YAML"):
        plan_upload(tmp_path / "bare", "me/model")
