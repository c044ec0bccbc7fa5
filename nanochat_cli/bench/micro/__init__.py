"""Measurements of parts: kernels, decoding, loaders, optimizers, single training steps."""
