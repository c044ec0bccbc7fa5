"""Running a trained model: loading it from a run or a GGUF file, the key/value cache, sampling, generation."""
