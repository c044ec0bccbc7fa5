"""Measurements of ourselves: `matched` training runs, and `micro` benchmarks of single parts."""
