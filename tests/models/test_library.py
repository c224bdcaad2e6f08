"""sentence-transformers without the packages that a run has no use for, and with them as soon as they are used."""

from __future__ import annotations

import decimal
import json
import os
import pickle
import subprocess
import sys
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from lead_ds.models.library import Later
from tests.helpers.forked import IMPORTED_WITH
from tests.helpers.rooms import make_rooms, settings

HEAVY = ("datasets", "pandas", "peft", "pyarrow", "scipy", "sklearn")
RUN_THEN_TRAIN = """
import json, sys
from lead_ds.cli.main import main
try:
    main(["distill", sys.argv[1]])
except SystemExit as done:
    assert done.code == 0
print("TOLD", json.dumps([name for name in sys.argv[3].split(",") if name in sys.modules]))
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import evaluation, losses
from datasets import Dataset
model = SentenceTransformer(sys.argv[2] + "/student", device="cpu")
words, others = ["red", "blue", "green", "old"], ["crimson", "navy", "lime", "new"]
given = SentenceTransformerTrainingArguments(sys.argv[2] + "/st", max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
pairs = Dataset.from_dict({"anchor": words, "positive": others})
trainer = SentenceTransformerTrainer(
    model, given, train_dataset=pairs, loss=losses.MultipleNegativesRankingLoss(model)
)
trained = trainer.train()
near = evaluation.EmbeddingSimilarityEvaluator(words, others, [1.0, 0.5, 0.3, 0.0])(model)
same = evaluation.BinaryClassificationEvaluator(words, others, [1, 1, 0, 0])(model)
from peft import LoraConfig, get_peft_model
from transformers.trainer_utils import PeftModel
adapted = get_peft_model(model[0].auto_model, LoraConfig(target_modules=["query"]))
kinds = [isinstance(one, PeftModel) for one in (adapted, model)]
print("TOLD", json.dumps({"steps": trained.global_step, "measures": {**near, **same}, "adapted": kinds}))
"""


def test_a_run_loads_no_heavy_package_and_the_library_works_after_it(tmp_path: Path) -> None:
    rooms = make_rooms(tmp_path / "rooms")
    tree = settings(rooms, tmp_path / "run", train={"steps": 1})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    done = subprocess.run(
        [sys.executable, "-c", RUN_THEN_TRAIN, str(tmp_path / "run.yaml"), str(tmp_path / "run"), ",".join(HEAVY)],
        env={**os.environ, **IMPORTED_WITH},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = (line.removeprefix("TOLD ") for line in done.stdout.splitlines() if line.startswith("TOLD "))
    loaded, library = map(json.loads, told)
    # Transformers 5.20, the newest for Python 3.10, loads scikit-learn with any tokenizer.
    assert loaded == [] or tuple(map(int, version("transformers").split(".")[:2])) <= (5, 20)
    assert library["steps"] == 1
    assert library["adapted"] == [True, False]
    assert {"spearman_cosine", "cosine_ap"} <= library["measures"].keys()


def test_what_stands_for_a_class_is_used_as_the_class() -> None:
    number: Any = Later("decimal", "Decimal")
    assert number("1.5") == decimal.Decimal("1.5")
    assert number.from_float(0.5) == decimal.Decimal("0.5")
    assert isinstance(decimal.Decimal(1), number)
    assert isinstance(decimal.Decimal(1), (int, number))
    assert isinstance(decimal.Decimal(1), number | None)
    assert not isinstance(1, number)
    assert issubclass(decimal.Decimal, number)
    assert isinstance(types.new_class("Own", (number,))(2), decimal.Decimal)
    assert pickle.loads(pickle.dumps(number))(1) == 1
    assert Later("collections", "Counter")[int]
    assert Later("decimal").Decimal is decimal.Decimal
    assert number
    assert Later("decimal")
    assert not Later("decimal", "absent")
    with pytest.raises(AttributeError, match="absent"):
        Later("decimal", "absent")()
