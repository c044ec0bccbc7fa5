"""Corpora, tokenizer, shards and batches."""
