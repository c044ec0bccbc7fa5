"""The Triton kernels compiled for absent GPUs: what the machine code must and must not contain.

Compiled in a child process without TRITON_INTERPRET, which would keep kernels from being compiled at all.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

DECODE_LIMITS = {"gemv_row_kernel": 0.8, "gemv_group_kernel": 1.4}
"""Lane-instructions per weight. An H200 issues 2.07 in the time in which its memory delivers a weight of 2 bits."""

INSTRUCTIONS = {
    "gemv_row_kernel": {"IDP"},
    "gemv_group_kernel": {"IDP"},
    "small_matmul_kernel": {"IMMA", "IGMMA"},
    "scaled_matmul_kernel": {"IMMA", "IGMMA", "UTCIMMA", "HMMA", "HGMMA", "UTCHMMA", "QGMMA", "UTCQMMA"},
}

MOVING = {"codes_kernel", "refresh_kernel", "quantize_kernel"}

Figures = dict[str, Any]


def compiled(*arguments: str) -> list[Figures]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "nanochat_kernels.triton_kernels.ahead_of_time", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def essential() -> list[Figures]:
    return compiled("--architectures", "80", "90")


def assert_sound(kernels: list[Figures]) -> None:
    for figures in kernels:
        name = f"{figures['kernel']} for sm_{figures['architecture']}: {figures['case']}"
        assert figures["stack"] == 0, f"{name} spills {figures['stack']} bytes"
        assert figures["local_accesses"] == 0, name
        expected = INSTRUCTIONS.get(figures["kernel"], set())
        assert not expected or expected & set(figures["multiply_adds"]), f"{name}: {figures['multiply_adds']}"


def decode_loops(kernels: list[Figures], token: str = "M=1,") -> list[Figures]:
    """The decode kernels for one token whose rows are long enough for a loop."""
    return [figures for figures in kernels if figures["kernel"] in DECODE_LIMITS and token in figures["case"]]


def test_no_essential_kernel_spills_and_each_has_its_multiply_add_instruction(essential):
    assert {figures["architecture"] for figures in essential} == {80, 90}
    assert {figures["kernel"] for figures in essential} >= set(INSTRUCTIONS) | {"codes_kernel", "quantize_kernel"}
    assert_sound(essential)


def test_large_int8_products_use_the_tensor_cores_of_their_architecture(essential):
    found = {
        figures["architecture"]: set(figures["multiply_adds"])
        for figures in essential
        if figures["case"].startswith("int8_matmul")
    }
    assert found == {80: {"IMMA"}, 90: {"IGMMA"}}


def test_the_fp8_twin_uses_the_fp8_tensor_cores_of_hopper(essential):
    found = [figures for figures in essential if figures["case"].startswith("fp8_matmul")]
    assert [(figures["architecture"], set(figures["multiply_adds"])) for figures in found] == [(90, {"QGMMA"})]


def test_decode_of_one_token_stays_within_its_instructions_per_weight(essential):
    loops = decode_loops(essential)
    assert {(figures["kernel"], figures["architecture"]) for figures in loops} >= {
        (kernel, architecture) for kernel in DECODE_LIMITS for architecture in (80, 90)
    }
    for figures in loops:
        assert figures["lane_instructions_per_weight"] <= DECODE_LIMITS[figures["kernel"]], figures


def test_no_thread_waits_for_another_in_a_decode_loop(essential):
    """Activations in another layout than the weights would go through shared memory, with two barriers per plane."""
    loops = decode_loops(essential, token="M=")
    assert {figures["kernel"] for figures in loops} == set(DECODE_LIMITS)
    for figures in loops:
        assert figures["loop_barriers"] == 0, figures


def test_unpacking_stores_sixteen_bytes_at_once(essential):
    found = [figures for figures in essential if figures["kernel"] == "unpack_kernel"]
    assert {(figures["case"], figures["architecture"]) for figures in found} >= {
        (f"unpack to {dtype}", architecture) for dtype in ("int8", "bfloat16") for architecture in (80, 90)
    }
    for figures in found:
        loads = "LDG.64" if figures["case"] == "unpack to bfloat16" else "LDG.128"
        assert set(figures["global_accesses"]) == {loads, "STG.128"}, figures


def test_quantisers_never_move_single_bytes(essential):
    """A lane reads 16 bytes of floats at once, and writes what comes of them at once: 4 codes of weights, or more."""
    found = [figures for figures in essential if figures["kernel"] in MOVING]
    assert {figures["kernel"] for figures in found} == MOVING
    for figures in found:
        narrow = [access for access in figures["global_accesses"] if access.endswith((".8", ".16"))]
        assert not narrow, figures
        assert figures["global_accesses"]["LDG.128"] >= 1, figures


def test_activations_are_divided_by_their_scale_with_correct_rounding(essential):
    """Triton's plain division is div.full, off by up to two units in the last place: other codes at ties.

    There is one, of the reciprocal; a fused multiply-add makes quotients of it (test_division.py).
    """
    found = [figures for figures in essential if figures["case"].startswith("quantize_activations")]
    assert len(found) == 2
    for figures in found:
        operations = figures["float_operations"]
        assert set(operations) == {"div.rn.f32", "fma.rn.f32", "add.f32", "mul.f32"}, figures
        assert operations["div.rn.f32"] == 1, figures


def test_the_epilogue_of_integer_products_is_two_roundings_in_the_reference_order(essential):
    """Only products: no sum that could be fused with one, and no division."""
    products = [figures for figures in essential if figures["case"].startswith("int8_matmul")]
    vectors = [figures for figures in essential if figures["kernel"] == "gemv_row_kernel"]
    assert products
    assert vectors
    for figures in products + vectors:
        assert set(figures["float_operations"]) == {"mul.f32"}, figures


def test_gradients_are_rounded_by_products_and_sums_that_are_not_fused(essential):
    """A fused one would round once where the reference rounds twice: another code near a tie."""
    found = [figures for figures in essential if figures["kernel"] == "gradient_codes_kernel"]
    assert {figures["architecture"] for figures in found} == {80, 90}
    for figures in found:
        assert set(figures["float_operations"]) == {"div.rn.f32", "add.f32", "mul.f32"}, figures


BLOCK_SCALED = {100: "UTCOMMA", 103: "UTCOMMA", 120: "OMMA"}
"""tcgen05.mma …kind::mxf4nvf4.block_scale and mma.sync …kind::mxf4nvf4.block_scale in machine code."""

SHARED = {100: 227 * 1024, 103: 227 * 1024, 120: 99 * 1024}
"""Bytes that a program may have."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nvfp4_products_use_the_block_scaled_tensor_cores_of_every_blackwell_and_no_others():
    kernels = compiled("--all", "--architectures", *(str(known) for known in BLOCK_SCALED), "--cases", "nvfp4")
    assert {figures["architecture"] for figures in kernels} == set(BLOCK_SCALED)
    assert {figures["kernel"] for figures in kernels} == {"nvfp4_matmul_kernel", "nvfp4_quantize_kernel"}
    assert_sound(kernels)
    for figures in kernels:
        multiplies, instruction = figures["kernel"] == "nvfp4_matmul_kernel", BLOCK_SCALED[figures["architecture"]]
        assert set(figures["multiply_adds"]) == ({instruction} if multiplies else set()), figures
        divisions = {name for name in figures["float_operations"] if name.startswith(("div", "rcp"))}
        assert divisions == (set() if multiplies else {"div.rn.f32"}), figures
        assert figures["shared"] <= SHARED[figures["architecture"]], figures


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_kernel_in_every_form_is_sound_for_every_architecture():
    kernels = compiled("--all", "--architectures", "80", "90", "100")
    assert_sound(kernels)
    for figures in decode_loops(kernels):
        if "768x768" not in figures["case"]:  # a row of 48 words is read at once: its loop is never entered
            assert figures["lane_instructions_per_weight"] <= DECODE_LIMITS[figures["kernel"]], figures
            assert figures["loop_barriers"] == 0, figures
    blackwell = {
        instruction
        for figures in kernels
        if figures["architecture"] == 100 and figures["case"].startswith("int8_matmul 8192")
        for instruction in figures["multiply_adds"]
    }
    assert blackwell == {"IMMA"}, "Triton 3.6 and 3.7 have no tcgen05 for integers (supportMMA): it takes warp products"
