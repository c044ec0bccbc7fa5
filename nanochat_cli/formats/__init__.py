"""The formats on disk: run folders and GGUF files, written and read, and the one way to open either."""
