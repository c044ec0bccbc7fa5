"""The model: embedding, blocks of attention and feed-forward with ternary linears, norm, head."""
