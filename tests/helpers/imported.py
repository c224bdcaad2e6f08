"""What most jobs import, imported once by the server that `launch` forks their processes from."""

import deepspeed  # noqa: F401
import sentence_transformers  # noqa: F401

import lead_ds.engine.training.distill
import lead_ds.models.chain
import lead_ds.retrieval.evaluate  # noqa: F401
