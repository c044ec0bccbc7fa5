"""Folders of the Hugging Face form: config.json, safetensors, tokenizer, card; written, read and uploaded."""
