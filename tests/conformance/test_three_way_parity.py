"""CPU kernels, Triton kernels and llama.cpp compute the same products as the reference."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet

from nanochat_cli.config.schema import ExportConfig
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.diagnose.validate.matmul_case import MatmulCase, Results
from nanochat_cli.diagnose.validate.matmul_parity import llama_cpp_product
from nanochat_cli.diagnose.validate.three_way_parity import (
    CORNERS,
    GRANULARITIES,
    ODD_TOKENS,
    SHAPES,
    Corner,
    CornerName,
    all_cases,
    quick_cases,
    reference,
    require_equal,
    run_corners,
    special_cases,
)
from nanochat_cli.errors import DataError
from nanochat_cli.formats.gguf.file import GGUFFile
from nanochat_cli.formats.gguf.read import load_gguf
from nanochat_cli.formats.gguf.write import export_gguf
from nanochat_cli.report.reporter import QuietReporter
from nanochat_kernels import PackedTernary
from tests.conformance.conftest import VOCAB_SIZE
from tests.gguf_bytes import without_checksum
from tests.inference.tiny_models import spread_model, tiny_config

LLAMA_CPP_SHAPES = [(128, 128), (256, 256), (512, 512), (2048, 2048), (127, 128), (17, 128), (33, 256), (63, 384)]
LLAMA_CPP_SHAPES += [(65, 256), (1, 4096)]
LARGE = 1024 * 1024
"""Weights of a matrix that takes seconds in a corner that is slow by nature."""


def slow_if_large(shapes: Sequence[tuple[int, int]], most: int = LARGE) -> list[ParameterSet]:
    """The shapes as parameters; those with more than `most` weights only among the slow tests."""
    slow = pytest.mark.slow
    return [pytest.param(*shape, marks=[slow] if shape[0] * shape[1] > most else []) for shape in shapes]


def of_shape(rows: int, columns: int) -> list[MatmulCase]:
    return [case for case in all_cases() if (case.rows, case.columns) == (rows, columns)]


def require_all_equal(cases: list[MatmulCase], *corners: CornerName) -> None:
    found = run_corners(cases, QuietReporter(), corners)
    require_equal(found.values(), required=corners)
    assert all(corner.cases > 0 for corner in found.values())


@pytest.mark.parametrize(("rows", "columns"), slow_if_large(SHAPES, 8 * LARGE))
def test_cpu_kernels_equal_the_reference(rows: int, columns: int) -> None:
    require_all_equal(of_shape(rows, columns), "cpu")


def test_cpu_kernels_equal_the_reference_on_a_large_matrix() -> None:
    require_all_equal([MatmulCase(512, 11008, 1, "row")], "cpu", "llama.cpp")


def some_of_shape(rows: int, columns: int) -> list[MatmulCase]:
    """Two granularities of a shape, each with one number of tokens; shapes take turns with both."""
    cases = [case for case in of_shape(rows, columns) if case == plain(case)]
    if len(cases) <= len(ODD_TOKENS):
        return cases
    fitting = list(dict.fromkeys(case.granularity for case in cases))
    first = 2 * SHAPES.index((rows, columns))
    pairs = {(fitting[n % len(fitting)], ODD_TOKENS[(n + n // 4) % len(ODD_TOKENS)]) for n in (first, first + 1)}
    return [case for case in cases if (case.granularity, case.tokens) in pairs]


def plain(case: MatmulCase) -> MatmulCase:
    """The case without special values, which have their own test."""
    return MatmulCase(case.rows, case.columns, case.tokens, case.granularity)


def test_triton_kernels_equal_the_reference_in_every_small_shape() -> None:
    """On the GPU where there is one, else under the interpreter, in one process; others than in `fewest_cases`."""
    cases = [
        *(MatmulCase(128, 128, 3, "tensor"), MatmulCase(127, 128, 7, 64), MatmulCase(1, 4096, 1, 256)),
        *(MatmulCase(17, 128, 65, "row"), MatmulCase(33, 256, 1, 64), MatmulCase(63, 384, 7, "row")),
        *(MatmulCase(65, 256, 3, 256), MatmulCase(33, 256, 65, 128)),
    ]
    small = {shape for shape in SHAPES if math.prod(shape) <= LARGE // 32}
    assert {(case.rows, case.columns) for case in cases} == small
    assert {case.granularity for case in cases} == set(GRANULARITIES)
    assert {case.tokens for case in cases} == set(ODD_TOKENS)
    require_all_equal(cases, "triton")


@pytest.mark.slow  # minutes under the interpreter
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_triton_kernels_equal_the_reference_in_every_combination(rows: int, columns: int) -> None:
    require_all_equal(of_shape(rows, columns), "triton")


@pytest.mark.parametrize(("rows", "columns"), slow_if_large(LLAMA_CPP_SHAPES))
def test_llama_cpp_equals_the_reference(rows: int, columns: int) -> None:
    require_all_equal(some_of_shape(rows, columns), "llama.cpp")


@pytest.mark.slow  # a file and a process for each of 20 products a shape
@pytest.mark.parametrize(("rows", "columns"), [*LLAMA_CPP_SHAPES, (4096, 11008), (11008, 4096)])
def test_llama_cpp_equals_the_reference_in_every_combination(rows: int, columns: int) -> None:
    require_all_equal(
        [case for case in of_shape(rows, columns) if case.tokens == 1 or rows * columns <= LARGE], "llama.cpp"
    )


@pytest.mark.parametrize(
    "corner", [pytest.param(corner, marks=[pytest.mark.slow] if corner == "triton" else []) for corner in CORNERS]
)
def test_special_values_are_equal_everywhere(corner: CornerName) -> None:
    """All-zero and all-±1 weights, zero activations, scales of 1e-5 and 65504."""
    if corner == "triton":  # a second each under the interpreter: each value once
        vectors, products = special_cases(63, 384, 1), special_cases(63, 384, 7)
        cases = [*vectors[::4], *products[3::4]]
        assert {case.granularity for case in cases} == {"row", 128}
    else:
        cases = [*special_cases(65, 256, 7), *special_cases(63, 384, 3)]
    require_all_equal(cases, corner)


def test_the_cases_are_those_that_were_promised() -> None:
    cases = all_cases()
    assert {(case.rows, case.columns) for case in cases} == set(SHAPES)
    assert {case.tokens for case in cases} == set(ODD_TOKENS)
    assert {case.granularity for case in cases} == {"row", "tensor", 256, 128, 64}
    assert set(SHAPES) >= {
        *((128, 128), (256, 256), (512, 512), (2048, 2048), (4096, 11008), (11008, 4096)),
        *((127, 128), (1, 4096), (17, 128), (33, 256), (63, 384), (65, 256)),
    }


@pytest.mark.parametrize("case", quick_cases(), ids=str)
def test_the_reference_is_integer_arithmetic(case: MatmulCase) -> None:
    """Oracle: numpy's int64 products of unpacked codes, and float64 sums over the groups."""
    found = reference(case)
    grid, codes = case.grid.numpy().astype(np.int64), case.ternary.codes.numpy().astype(np.int64)
    assert np.array_equal(found["ternary_matmul.integers"].numpy(), grid @ codes.T)
    group = case.group or case.columns
    values = np.zeros((case.tokens, case.rows))
    magnitudes = np.zeros_like(values)
    for g in range(case.columns // group):
        inputs = slice(g * group, (g + 1) * group)
        term = (grid[:, inputs] @ codes[:, inputs].T) * case.packed.scales[:, g].double().numpy()
        values += term
        magnitudes += abs(term)
    scale = case.grid_scale.double().numpy()
    difference = abs(found["ternary_matmul.values"].numpy() - values * scale)
    assert (difference <= 1e-6 * magnitudes * scale).all()  # float32 has 6e-8 per operation


# --- faults are found -------------------------------------------------------------------------------------------------


def one_more(results: Results, name: str) -> Results:
    changed = results[name].clone()
    changed.view(-1)[-1] += 1
    return {**results, name: changed}


@pytest.mark.parametrize(
    "name",
    [
        *("ternarize.codes", "unpack.codes", "quantize_activations.codes", "quantize_activations.sums"),
        *("ternary_matmul.integers", "int8_matmul.integers", "rmsnorm_quantize.sums"),
    ],
)
def test_one_integer_that_is_off_by_one_is_a_difference(name: str) -> None:
    case = MatmulCase(17, 128, 3)
    results = reference(case)
    corner = Corner("cpu", "")
    corner.compare(case, one_more(results, name), results)
    assert len(corner.differences) == 1
    assert name in corner.differences[0]


@pytest.mark.parametrize("granularity", ["row", 64])
def test_a_value_that_is_off_by_more_than_the_tolerance_is_a_difference(granularity) -> None:
    case = MatmulCase(17, 128, 3, granularity)
    results = reference(case)
    for relative, n_differences in ((2e-6, 0), (1e-4, 1)):
        corner = Corner("cpu", "")
        values = results["ternary_matmul.values"]
        corner.compare(case, {"ternary_matmul.values": values * (1 + relative)}, results)
        assert len(corner.differences) == n_differences


def test_llama_cpp_notices_a_single_flipped_code() -> None:
    case = MatmulCase(33, 256, 3)
    codes = case.ternary.codes
    expected = case.grid.long() @ codes.long().T
    assert torch.equal(torch.from_numpy(llama_cpp_product(case).integers).round().long(), expected)
    codes[20, 100] = 1 - codes[20, 100].abs()
    integers = torch.from_numpy(llama_cpp_product(case).integers).round().long()
    assert (integers != expected).any(dim=0).nonzero().flatten().tolist() == [20]


def test_a_corner_that_must_exist_and_does_not_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanochat_cli.errors import ValidationFailure
    from nanochat_cli.export import llama_cpp

    monkeypatch.setattr(llama_cpp, "is_available", lambda: False)
    corners = run_corners([MatmulCase(17, 128, 1)], QuietReporter(), ["llama.cpp"])
    assert corners["llama.cpp"].verdict == "absent"
    require_equal(corners.values(), required=())
    with pytest.raises(ValidationFailure, match=r"llama\.cpp must run here and does not: everything: xllamacpp is not"):
        require_equal(corners.values(), required=["llama.cpp"])


# --- code 3 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 31, 95, -1])
@pytest.mark.parametrize("plane", range(4))
def test_code_3_in_packed_bytes_is_rejected_at_load(place: int, plane: int) -> None:
    packed = MatmulCase(17, 384, 1).packed
    PackedTernary.from_bytes(packed.packed, packed.scales, packed.columns)
    damaged = packed.packed.clone()
    damaged.view(-1)[place] |= 3 << 2 * plane
    with pytest.raises(ValueError, match="invalid code 3"):
        PackedTernary.from_bytes(damaged, packed.scales, packed.columns)


@pytest.mark.parametrize("type_name", ["tq2_0", "q2_0"])
def test_code_3_in_a_gguf_file_is_rejected_at_load(tmp_path: Path, tokenizer: Tokenizer, type_name) -> None:
    path = tmp_path / "model.gguf"
    model = spread_model(tiny_config(vocab_size=VOCAB_SIZE))
    export_gguf(model, tokenizer, path, ExportConfig(type=type_name), {})
    load_gguf(path)
    tensor = GGUFFile(path).tensors["blk.1.ffn_down.weight"]
    content = bytearray(without_checksum(path.read_bytes()))
    content[tensor.data_offset + 5] |= 3
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"model\.gguf: blk\.1\.ffn_down\.weight .*holds values other than -1, 0 and 1"):
        load_gguf(path)
