"""The definitions: every operation in plain PyTorch, on any device, in the fewest words."""
