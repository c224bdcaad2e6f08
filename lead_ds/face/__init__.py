"""lead-ds from Python: what the command line does, as objects."""

from lead_ds.engine.records.callbacks import Callback
from lead_ds.face.distiller import Distiller
from lead_ds.face.model import Model, load
from lead_ds.face.search import Reranker, Searcher

__all__ = ["Callback", "Distiller", "Model", "Reranker", "Searcher", "load"]
