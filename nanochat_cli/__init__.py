"""nanochat: train, measure, validate and export small ternary (1.58-bit) language models."""

__version__ = "0.1.0"
