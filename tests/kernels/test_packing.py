"""The packed layout against the bytes of the format and against the gguf package."""

import gguf
import numpy as np
import pytest
import torch

from nanochat_kernels import pack_plane128, unpack_plane128


def random_codes(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (17, 128), (33, 256), (63, 384), (65, 1024)])
def test_unpacking_returns_what_was_packed(rows, columns):
    codes = random_codes(rows, columns, rows)
    packed = pack_plane128(codes)
    assert packed.shape == (rows, columns // 4)
    assert torch.equal(unpack_plane128(packed, columns), codes)


def test_byte_j_holds_inputs_j_j32_j64_j96_from_the_low_bits_up():
    codes = torch.zeros(1, 128, dtype=torch.int8)
    codes[0, 5], codes[0, 37], codes[0, 69], codes[0, 101] = -1, 0, 1, -1
    assert int(pack_plane128(codes)[0, 5]) == 0 | 1 << 2 | 2 << 4 | 0 << 6


def test_the_bytes_are_those_of_tq2_0():
    codes = random_codes(8, 512, 1)
    blocks = gguf.quants.quantize(codes.numpy().astype(np.float32), gguf.GGMLQuantizationType.TQ2_0)
    qs = blocks.reshape(8, 2, 66)[:, :, :64].reshape(8, 128)
    np.testing.assert_array_equal(pack_plane128(codes).numpy(), qs)


def test_the_invalid_code_3_is_refused():
    packed = pack_plane128(random_codes(2, 128, 2))
    packed[1, 7] |= 0b11
    with pytest.raises(ValueError, match="invalid code 3"):
        unpack_plane128(packed, 128)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiple of 128"):
        pack_plane128(random_codes(2, 192, 3))
    with pytest.raises(ValueError, match="do not hold"):
        unpack_plane128(torch.zeros(2, 32, dtype=torch.uint8), 256)
    with pytest.raises(ValueError, match="-1, 0 or 1"):
        pack_plane128(torch.full((1, 128), 2, dtype=torch.int8))
