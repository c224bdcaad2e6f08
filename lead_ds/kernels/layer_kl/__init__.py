"""KL divergence of two models' relevance distributions, layer by layer: reference, chunked torch, Triton, operator."""
