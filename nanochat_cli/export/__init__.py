"""The proof that an exported file holds the model: read back bit for bit, and compared with llama.cpp."""
