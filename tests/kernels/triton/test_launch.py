"""The Triton launchers where no kernel can run; and they never read data."""

import itertools
import logging
import os
import subprocess
import sys

import pytest
import torch

import nanochat_kernels
from nanochat_kernels.backends import Unsupported
from nanochat_kernels.reference import operations as reference
from nanochat_kernels.triton_kernels import ahead_of_time, operations
from nanochat_kernels.triton_kernels.configurations import (
    SmallMatmulConfiguration,
    architecture,
    gemv_configuration,
    matmul_configuration,
    small_matmul_configuration,
)
from nanochat_kernels.triton_kernels.language import INTERPRETED
from nanochat_kernels.triton_kernels.launch import record

compiled_only = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set: CPU tensors are taken")


@compiled_only
def test_cpu_tensors_are_unsupported_with_the_way_out_named():
    with pytest.raises(Unsupported, match="TRITON_INTERPRET=1"):
        operations.quantize_activations(torch.ones(2, 128))


@compiled_only
def test_asking_for_triton_on_the_cpu_falls_back_to_the_reference_and_says_so(caplog):
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING, logger="nanochat_kernels"):
        nanochat_kernels.backends._said.clear()
        codes = nanochat_kernels.quantize_activations(x, backend="triton").codes
    assert torch.equal(codes, reference.quantize_activations(x).codes)
    assert "TRITON_INTERPRET=1" in caplog.text


def test_the_dispatcher_runs_the_kernels_on_cpu_tensors_in_a_process_that_interprets():
    program = """
import torch
from nanochat_kernels import quantize_activations, ternarize_packed, ternary_matmul
x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
weight = ternarize_packed(torch.randn(8, 256, generator=torch.Generator().manual_seed(1)), backend="triton")
y = ternary_matmul(quantize_activations(x, backend="triton"), weight, backend="triton")
print(torch.equal(y, ternary_matmul(quantize_activations(x, backend="reference"), weight, backend="reference")))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
    assert "slower form" not in done.stderr


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_no_launcher_reads_data_from_the_device(capability):
    """Meta tensors have no data: anything that synchronises with the host, such as item(), raises."""
    cases = [case for case in ahead_of_time.cases() if capability in case.architectures]
    assert cases
    for case in cases:
        assert ahead_of_time.launches(case, capability), case.name


def test_a_split_of_the_inputs_launches_a_second_kernel_and_enough_outputs_do_not():
    with record(90) as few:
        operations.ternary_matmul(ahead_of_time.activations(16, 4096), ahead_of_time.weight(4096, 4096))
    with record(90) as many:
        operations.ternary_matmul(ahead_of_time.activations(16, 4096), ahead_of_time.weight(28672, 4096))
    assert [call.kernel.fn.__name__ for call in few.calls] == ["small_matmul_kernel", "add_partials_kernel"]
    assert [call.kernel.fn.__name__ for call in many.calls] == ["small_matmul_kernel"]


def test_one_scale_per_row_takes_one_launch_and_a_model_one_for_each_shape_of_its_weights():
    def held(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        return *(torch.empty(rows, n, device="meta") for n in (columns, 1, columns)), None

    layers = [held(768, 768), held(256, 768), held(768, 768), held(768, 2048), held(256, 768)]
    with record(90) as model:
        operations.ternarize_rows(*zip(*layers, strict=True))
    with record(90) as alone:
        operations.ternarize(layers[0][0])
        operations.ternarize_packed(layers[0][0])
    assert [(call.kernel.fn.__name__, call.grid) for call in model.calls] == [
        ("refresh_kernel", (192, 2)), ("refresh_kernel", (64, 2)), ("refresh_kernel", (192, 1))
    ]  # fmt: skip
    assert [call.kernel.fn.__name__ for call in alone.calls] == ["codes_kernel"] * 2


def test_fp8_is_unsupported_where_the_device_has_none():
    operand = torch.empty(16, 128, dtype=torch.float8_e4m3fn, device="meta")
    scale = torch.empty(16, 1, device="meta")
    with record(80), pytest.raises(Unsupported, match=r"8\.0 has no fp8"):
        operations.fp8_matmul(operand, operand, scale, scale)


@pytest.mark.parametrize("capability", [80, 90, 110])
def test_nvfp4_products_are_unsupported_where_no_tensor_core_was_compiled_for(capability):
    packed, weight = (torch.empty(16, bytes_, dtype=torch.uint8, device="meta") for bytes_ in (144, 128))
    scale = torch.empty(16, 1, device="meta")
    with record(capability), pytest.raises(Unsupported, match=f"{capability / 10} has no NVFP4"):
        operations.nvfp4_matmul(packed, scale, weight, scale)


def test_an_unknown_newer_device_takes_the_table_of_the_newest_known():
    assert [architecture(capability) for capability in (80, 86, 89, 90, 100, 103, 120, 200)] == [
        80, 80, 80, 90, 100, 100, 100, 100
    ]  # fmt: skip


def test_every_decode_tile_is_one_that_triton_accepts_and_fills_a_warp_and_the_gpu():
    """A warp of an H100 reads 128 words of 16 weights at once; its 132 multiprocessors want some programs each."""
    shapes = itertools.product((1, 2, 3, 4), (1, 768, 4096, 50304), (128, 256, 384, 768, 2048, 4096, 11008))
    for tokens, outputs, columns in shapes:
        tile, shape = gemv_configuration(90, tokens, outputs, columns), (tokens, outputs, columns)
        assert all(size > 0 and size.bit_count() == 1 for size in (tile.rows, tile.words, tile.num_warps)), shape
        assert tile.rows * tile.words in (128, 256, 512) or (tile.rows == 1 and tile.words * 16 >= columns), shape
        if tile.rows > 1:
            assert outputs / tile.rows >= 4 * 132, f"{shape}: too few programs for the GPU"
            assert tile.rows in (2, 4) or columns < 2048, f"{shape}: rows that do not fill a warp share one"
            assert tokens == 1 or columns < 2048, f"{shape}: several tokens leave registers for one row"


@pytest.mark.parametrize(
    ("tokens", "outputs", "columns", "tile"),
    [
        (1, 50304, 2048, (4, 128)),
        (1, 8192, 8192, (4, 128)),
        (1, 4096, 4096, (4, 128)),
        (1, 2816, 2816, (2, 128)),
        (4, 50304, 2048, (1, 128)),
        (1, 768, 4096, (1, 128)),
        (1, 50304, 768, (8, 16)),
        (1, 768, 768, (1, 64)),
        (2, 4096, 384, (1, 32)),
        (1, 50304, 128, (16, 8)),
    ],
)
def test_the_decode_tile_of_a_shape_is_the_one_that_the_table_explains(tokens, outputs, columns, tile):
    found = gemv_configuration(90, tokens, outputs, columns)
    assert (found.rows, found.words) == tile


@pytest.mark.parametrize(
    ("rows", "outputs", "tile"),
    [
        (8192, 8192, (128, 256, 8, 3)),  # measured: 1.25 PFLOP/s
        (512, 8192, (128, 128, 4, 3)),  # measured: 1.13 times the one above, 1.28 times the one below
        (512, 4096, (64, 128, 4, 4)),  # 128 programs would leave multiprocessors without one
        (32768, 768, (128, 128, 4, 3)),
        (100, 65536, (64, 128, 4, 4)),
    ],
)
def test_the_int8_tile_on_hopper_follows_from_how_many_programs_fill_its_multiprocessors(rows, outputs, tile):
    found = matmul_configuration(90, torch.int8, rows, outputs)
    assert (found.block_m, found.block_n, found.num_warps, found.num_stages) == tile


def test_sixteen_tokens_take_the_measured_tile_of_the_packed_product():
    assert small_matmul_configuration(90, 0, 16, 8192, 8192) == SmallMatmulConfiguration(64, 16, 2, 4, 4, 3)
