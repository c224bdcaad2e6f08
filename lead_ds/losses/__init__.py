"""Divergences between a teacher's and a student's relevance, and the objective that sums them.

Knows relevance only: no model, no text, no process. Temperatures divide logits; every KL is in nats.
"""

from lead_ds.losses.attention import TextTaps, attention_loss, pair_taps
from lead_ds.losses.contrastive import contrastive_loss
from lead_ds.losses.divergence import entropy, relevance_kl
from lead_ds.losses.layer import LayerKLOutput, layer_relevance_kl
from lead_ds.losses.margin import margin_mse
from lead_ds.losses.objective import Objective, ObjectiveOutput, Views
from lead_ds.losses.response import response_kl
from lead_ds.losses.selection import informative_layers, select_layers

__all__ = [
    "LayerKLOutput",
    "Objective",
    "ObjectiveOutput",
    "TextTaps",
    "Views",
    "attention_loss",
    "contrastive_loss",
    "entropy",
    "informative_layers",
    "layer_relevance_kl",
    "margin_mse",
    "pair_taps",
    "relevance_kl",
    "response_kl",
    "select_layers",
]
