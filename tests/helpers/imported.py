"""What most processes of tests import, imported once by the one that they are forked from."""

import importlib

NAMES = ["deepspeed", "transformers.models.bert.modeling_bert"]
NAMES += ["bm25s", "faiss", "ir_measures"]  # which not every machine has
NAMES += ["lead_ds.engine.training.distill", "lead_ds.engine.training.warmup", "lead_ds.teachers.teach"]
NAMES += ["lead_ds.models.chain", "lead_ds.retrieval.evaluate", "lead_ds.retrieval.mine", "lead_ds.retrieval.search"]
NAMES += ["lead_ds.report", "lead_ds.cli.main"]

for name in NAMES:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if name.startswith("lead_ds") or error.name != name:
            raise

importlib.import_module("lead_ds.models.library").sentence_transformers()
