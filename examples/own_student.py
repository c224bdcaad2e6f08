"""Distil into a torch module of your own: any that turns texts into vectors, and exposes its layers if it likes.

python examples/own_student.py TEACHER OUTPUT
"""

import sys
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lead_ds import Distiller, Searcher, load, losses


class BagOfWords(nn.Module):
    """The mean of its words' vectors, through two residual layers."""

    def __init__(self, words: int = 5000, width: int = 32) -> None:
        super().__init__()
        self.words = words
        self.embedding = nn.EmbeddingBag(words, width, mode="mean", padding_idx=0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(2))

    def tokenize(self, texts: Sequence[str], side: str) -> dict[str, Tensor]:
        rows = [[1 + zlib.crc32(word.encode()) % (self.words - 1) for word in text.lower().split()] for text in texts]
        width = max(1, *map(len, rows))
        return {"ids": torch.tensor([row + [0] * (width - len(row)) for row in rows])}

    def forward(self, tokens: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        state = self.embedding(tokens["ids"])
        layers = []
        for block in self.blocks:
            state = state + block(state)
            layers.append(state)
        return nn.functional.normalize(state, dim=-1), layers


teacher, output = sys.argv[1:]
things = {
    "octopus": "has three hearts",
    "glacier": "grinds rock",
    "violin": "carries four strings",
    "owl": "flies silently",
}
rows = [{"query": f"what {fact}", "positives": [f"the {thing} {fact}"]} for thing, fact in things.items()]
student = BagOfWords()
run = Distiller(
    teacher=load(teacher, max_length=64),  # a module of your own will do, too
    student={"module": student, "scale": "cosine"},
    data=rows,
    losses=[losses.Response(), losses.Layer(k=2), losses.Contrastive(temperature=0.05)],
    steps=30,
    batch_size=2,
    negatives=2,
    lr=1e-2,
    output=output,
).train()
print(Searcher(run.student, [row["positives"][0] for row in rows]).search("what grinds rock", k=2))
print("weights in", run.folder / "model.safetensors")
