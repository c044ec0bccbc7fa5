"""Packing is lossless and byte-compatible with ggml; oracles: gguf's own codecs and bytes written by hand."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.formats.gguf.packing import Q2_0, TERNARY_TYPES, block_scales, fitting_types, pack, unpack

WITH_GGUF_CODEC = ["tq2_0", "tq1_0", "q4_0"]
F16_EXTREMES = [0.0, 6e-8, 6e-5, 1e-5, 0.5, 1.0, 65504.0]
scales_f16 = st.one_of(
    st.sampled_from(F16_EXTREMES), st.floats(0, 65504, width=16, allow_nan=False, allow_subnormal=True)
).map(lambda value: float(np.float16(value)))


@st.composite
def ternary_matrices(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    rows = draw(st.integers(1, 4))
    columns = 256 * draw(st.integers(1, 3))
    codes = draw(
        st.one_of(
            hnp.arrays(np.int8, (rows, columns), elements=st.integers(-1, 1)),
            st.sampled_from([-1, 0, 1]).map(lambda value: np.full((rows, columns), value, np.int8)),
        )
    )
    shape = draw(st.sampled_from([(1, 1), (rows, 1), (rows, columns // 256)]))
    scales = draw(hnp.arrays(np.float32, shape, elements=scales_f16.map(np.float32)))
    return codes, scales


def expanded(scales: np.ndarray, codes: np.ndarray) -> np.ndarray:
    rows, columns = codes.shape
    return np.repeat(np.broadcast_to(scales, (rows, scales.shape[1])), columns // scales.shape[1], axis=1)


@settings(max_examples=60, deadline=None)
@given(ternary_matrices())
@pytest.mark.parametrize("name", sorted(TERNARY_TYPES))
def test_unpack_returns_exactly_the_packed_codes_and_scales(name: str, matrix: tuple[np.ndarray, np.ndarray]) -> None:
    codes, scales = matrix
    unpacked, block = unpack(name, pack(name, codes, scales))
    assert np.array_equal(unpacked, codes)
    assert np.array_equal(expanded(block.astype(np.float32), codes), expanded(scales, codes))


@settings(max_examples=60, deadline=None)
@given(ternary_matrices())
@pytest.mark.parametrize("name", WITH_GGUF_CODEC)
def test_ggufs_own_decoder_reads_the_same_weights(name: str, matrix: tuple[np.ndarray, np.ndarray]) -> None:
    codes, scales = matrix
    decoded = gguf.quants.dequantize(pack(name, codes, scales), TERNARY_TYPES[name].ggml_type)
    assert np.array_equal(decoded, codes * expanded(scales, codes))


@pytest.mark.parametrize("name", ["tq2_0", "tq1_0"])
def test_bytes_equal_ggufs_encoder_where_it_is_exact(name: str) -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(-1, 2, (8, 1024), dtype=np.int8)
    codes[:, ::256] = 1  # gguf takes the absolute maximum as the scale: every block needs a non-zero code
    scales = rng.random((8, 1), dtype=np.float32).astype(np.float16).astype(np.float32)
    expected = gguf.quants.quantize((codes * scales).astype(np.float32), TERNARY_TYPES[name].ggml_type)
    assert np.array_equal(pack(name, codes, scales), expected)


def test_q2_0_bytes_written_by_hand() -> None:
    codes = np.zeros((1, 64), np.int8)
    codes[0, :8] = [-1, 0, 1, 1, 1, 1, 1, -1]
    packed = pack("q2_0", codes, np.array([[1.5]], np.float32))
    # f16 1.5 = 0x3E00; code + 1 in two bits, the first code lowest: 0b10100100, 0b00101010; a zero is 01 four times.
    assert packed.tobytes() == bytes([0x00, 0x3E, 0b10_10_01_00, 0b00_10_10_10] + [0b01_01_01_01] * 14)


def test_q4_0_bytes_written_by_hand() -> None:
    codes = np.zeros((1, 32), np.int8)
    codes[0, 0], codes[0, 16], codes[0, 15] = -1, 1, 1
    packed = pack("q4_0", codes, np.array([[-0.0]], np.float32))
    assert packed.tobytes() == bytes([0x00, 0x80, 0x97] + [0x88] * 14 + [0x89])


def test_q2_0_is_known_to_gguf_with_the_official_block() -> None:
    assert gguf.GGMLQuantizationType(42) is Q2_0
    assert gguf.constants.GGML_QUANT_SIZES[Q2_0] == (64, 18)


@pytest.mark.parametrize(
    ("name", "group", "fits"),
    [
        *[("tq2_0", g, g >= 256) for g in (512, 256, 128, 64, 32)],
        *[("tq1_0", g, g >= 256) for g in (512, 256, 128, 64, 32)],
        *[("q2_0", g, g >= 64) for g in (512, 256, 128, 64, 32)],
        *[("q4_0", g, g >= 32) for g in (512, 256, 128, 64, 32, 16)],
    ],
)
def test_a_type_is_refused_exactly_when_a_block_would_need_two_scales(name: str, group: int, fits: bool) -> None:
    rng = np.random.default_rng(group)
    codes = rng.integers(-1, 2, (4, 512), dtype=np.int8)
    scales = (1 + np.arange(4 * (512 // group), dtype=np.float32)).reshape(4, -1)
    if fits:
        unpacked, block = unpack(name, pack(name, codes, scales))
        assert np.array_equal(unpacked, codes)
        assert np.array_equal(expanded(block.astype(np.float32), codes), expanded(scales, codes))
    else:
        with pytest.raises(ConfigError, match="not constant within a block") as refused:
            pack(name, codes, scales, "blk.0.attn_q.weight")
        assert "blk.0.attn_q.weight" in str(refused.value)
        assert all(other in str(refused.value) for other in [*fitting_types(scales, 4, 512), "f16"])


@pytest.mark.parametrize(
    ("columns", "fits"), [(96, ["q4_0"]), (320, ["q2_0", "q4_0"]), (100, []), (256, [*TERNARY_TYPES])]
)
def test_a_type_is_refused_when_the_row_is_not_a_multiple_of_its_block(columns: int, fits: list[str]) -> None:
    codes = np.ones((2, columns), np.int8)
    scales = np.ones((2, 1), np.float32)
    assert fitting_types(scales, 2, columns) == fits
    for name in set(TERNARY_TYPES) - set(fits):
        with pytest.raises(ConfigError, match=f"{columns} columns are not a multiple"):
            pack(name, codes, scales)


def test_equal_neighbour_scales_make_a_finer_granularity_fit() -> None:
    scales = np.repeat(np.array([[0.5, 2.0]], np.float32), 2, axis=1)
    assert fitting_types(scales, 1, 512) == [*TERNARY_TYPES]


def test_groups_that_do_not_nest_with_blocks_are_compared_by_element() -> None:
    equal, different = np.ones((1, 4), np.float32), np.array([[1, 2, 1, 1]], np.float32)
    assert block_scales(equal, 1, 768, 256) is not None
    assert block_scales(different, 1, 768, 256) is None


def test_scales_that_are_not_f16_values_are_a_programming_error() -> None:
    with pytest.raises(ValueError, match="rounded to f16"):
        pack("tq2_0", np.ones((1, 256), np.int8), np.array([[0.1]], np.float32))


@pytest.mark.parametrize(("name", "byte"), [("tq2_0", 0xFF), ("q2_0", 0xFF), ("q4_0", 0x00), ("q4_0", 0xFF)])
def test_a_float_tensor_is_not_a_ternary_matrix(name: str, byte: int) -> None:
    packed = np.full((1, TERNARY_TYPES[name].block_bytes), byte, np.uint8)
    with pytest.raises(DataError, match="not a ternary model"):
        unpack(name, packed)
