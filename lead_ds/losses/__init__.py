"""Losses: what a student is trained by, one file each, with its settings, its formula and its module.

Knows relevance and features only: no model, no text, no process. Temperatures divide logits; every KL is in nats.
"""

from lead_ds.losses.attention import Attention, TextTaps, attention_loss, pair_taps
from lead_ds.losses.contrastive import Contrastive, contrastive_loss
from lead_ds.losses.divergence import entropy, relevance_kl
from lead_ds.losses.embedding import Embedding, embedding_distance
from lead_ds.losses.flops import Flops, flops
from lead_ds.losses.layer import Layer, LayerKLOutput, layer_relevance_kl
from lead_ds.losses.loss import LOSSES, Chosen, Loss, Losses, LossSettings, LossShape, ModelFacts, Need, register
from lead_ds.losses.margin_mse import MarginMSE, margin_mse
from lead_ds.losses.objective import Asked, Objective, ObjectiveOutput
from lead_ds.losses.response import Response, response_kl
from lead_ds.losses.selection import Depths, informative_layers
from lead_ds.losses.similarity import Similarity, similarity_mse
from lead_ds.losses.spread import Spread, spread_out
from lead_ds.losses.vectors import final_vectors
from lead_ds.losses.views import Scope, Side, Views

__all__ = [
    "LOSSES",
    "Asked",
    "Attention",
    "Chosen",
    "Contrastive",
    "Depths",
    "Embedding",
    "Flops",
    "Layer",
    "LayerKLOutput",
    "Loss",
    "LossSettings",
    "LossShape",
    "Losses",
    "MarginMSE",
    "ModelFacts",
    "Need",
    "Objective",
    "ObjectiveOutput",
    "Response",
    "Scope",
    "Side",
    "Similarity",
    "Spread",
    "TextTaps",
    "Views",
    "attention_loss",
    "contrastive_loss",
    "embedding_distance",
    "entropy",
    "final_vectors",
    "flops",
    "informative_layers",
    "layer_relevance_kl",
    "margin_mse",
    "pair_taps",
    "register",
    "relevance_kl",
    "response_kl",
    "similarity_mse",
    "spread_out",
]
