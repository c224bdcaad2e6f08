"""KL divergence between two models' attention distributions: reference, chunked torch, Triton, and the operators."""
