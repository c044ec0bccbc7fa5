"""What a trained model looks like inside: its ternary layers, and its residual streams."""
