"""Search with a dual encoder, rerank what it found with a model of another kind, and look into the layers of both.

    python examples/search_and_rerank.py DUAL_ENCODER RERANKER

RERANKER: a cross-encoder, a ColBERT, or a decoder reranker.
"""

import sys

from lead_ds import Reranker, Searcher, load

PASSAGES = {
    "octopus": "The octopus has three hearts and blue blood.",
    "glacier": "A glacier grinds rock into fine grey flour.",
    "violin": "The violin carries four strings tuned in fifths.",
    "owl": "An owl flies silently on soft feathers.",
    "camel": "The camel stores fat in its hump.",
}

retriever, reranker = load(sys.argv[1]), Reranker(load(sys.argv[2], max_length=64))
searcher = Searcher(retriever, PASSAGES)  # or a folder with corpus.jsonl, or index="what lead-ds index wrote"
query = "which animal has several hearts"
hits = searcher.search(query, k=3)
print("found:   ", [(hit.id, round(hit.score, 3)) for hit in hits])
print("reranked:", [(hit.id, round(hit.score, 3)) for hit in reranker.rank(query, hits)])

for model in (retriever, reranker.model):
    relevance = model.layers(query, [hit.text for hit in hits])  # [layers + 1, passages]
    best = [hits[int(place)].id for place in relevance.argmax(1)]
    print(f"{model}: the best passage by each layer, then by the final state: {best}")
