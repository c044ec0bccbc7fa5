"""Measurements: matched runs, result files, statistics."""
