"""KL divergence of attention maps of two tokenizers, over groups of tokens that cover the same characters."""
