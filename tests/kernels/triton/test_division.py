"""The division of activations by their scale, on numbers instead of on a GPU, whose fused multiply-add numpy lacks."""

from types import SimpleNamespace

import numpy as np

from nanochat_kernels.triton_kernels import language


def fused_multiply_add(a, b, c):
    """a · b + c of float32, rounded once: exact product, sum rounded to odd in float64 (Boldo and Melquiond 2008)."""
    product, c = a.astype(np.float64) * b, np.asarray(c, np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    even = (error != 0) & (total.view(np.int64) % 2 == 0)
    return np.where(even, np.nextafter(total, np.copysign(np.inf, error)), total).astype(np.float32)


def test_the_fast_division_is_correctly_rounded_also_next_to_ties(monkeypatch):
    numbers = SimpleNamespace(fma=fused_multiply_add, div_rn=np.divide, zeros_like=np.zeros_like)
    monkeypatch.setattr(language, "tl", numbers)
    generator = np.random.default_rng(0)
    for _ in range(60):
        scale = np.float32(np.exp(generator.uniform(-15, 60)))
        halves = (generator.integers(-127, 127, 4000) + np.float32(0.5)).astype(np.float32) * scale
        near = [np.nextafter(halves, np.float32(sign * np.inf)) for sign in (-1, 1)]
        spread = generator.uniform(-130, 130, 20000).astype(np.float32) * scale
        x = np.concatenate([halves, *near, spread, spread * np.float32(1e-6)])
        assert np.array_equal(language.divide.fn(x, scale, True), x / scale), scale
