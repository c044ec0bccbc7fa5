"""GGUF files: names, types and packing of tensors, the writer and the reader."""
