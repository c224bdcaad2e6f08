"""MaxSim, the late-interaction score of ColBERT: reference, chunked torch, Triton, and the operator over them."""
