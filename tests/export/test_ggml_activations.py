"""The simulation of ggml's activation rounding, against gguf's own Q8_0 codec and a loop in numpy."""

import gguf
import numpy as np
import pytest
import torch

from nanochat_cli.export.ggml_activations import q8_0, q8_k


def random_activations(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 512, generator=generator) * torch.logspace(-3, 3, 512)
    x[1] = 0
    x[2, :32] = 0
    x[3] = -x[3].abs()
    return x


@pytest.mark.parametrize("seed", range(5))
def test_q8_0_equals_ggufs_codec_bit_for_bit(seed: int) -> None:
    x = random_activations(seed)
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), kind), kind)
    assert np.array_equal(q8_0(x).numpy(), expected)


def q8_k_by_loop(row: np.ndarray) -> np.ndarray:
    """quantize_row_q8_K_ref, statement by statement."""
    out = np.zeros_like(row)
    for start in range(0, len(row), 256):
        block = row[start : start + 256]
        amax, extreme = np.float32(0), np.float32(0)
        for value in block:
            if abs(value) > amax:
                amax, extreme = abs(value), value
        if amax == 0:
            continue
        inverse = np.float32(-127) / extreme
        codes = np.minimum(127, np.rint(inverse * block))
        out[start : start + 256] = codes * (np.float32(1) / inverse)
    return out


@pytest.mark.parametrize("seed", range(5))
def test_q8_k_equals_the_loop_of_ggml(seed: int) -> None:
    x = random_activations(seed)
    assert np.array_equal(q8_k(x).numpy(), np.stack([q8_k_by_loop(row) for row in x.numpy()]))


def test_a_tie_of_magnitudes_takes_the_first_as_ggml_does() -> None:
    x = torch.zeros(1, 256)
    x[0, 3], x[0, 7], x[0, 9] = 2.0, -2.0, 0.5
    assert np.array_equal(q8_k(x).numpy(), np.stack([q8_k_by_loop(row) for row in x.numpy()]))
