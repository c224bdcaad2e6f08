"""Scorers: dual encoder, ColBERT, cross-encoder, decoder reranker; layer capture; loading and saving."""
