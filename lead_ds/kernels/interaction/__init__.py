"""Divergence of the attention of query tokens to passage tokens: chunked torch, a Triton kernel over the maps, operator."""
