"""Which backend computes an operation: their order, how it is overridden, and how a fallback is logged."""

import logging
import subprocess
import sys

import pytest
import torch

from nanochat_kernels import backends, quantize_activations, ternary_matmul
from nanochat_kernels.backends import Unsupported, candidates, requested_backend
from nanochat_kernels.reference.packed import PackedTernary
from nanochat_kernels.reference.ternarize import ternarize

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def automatic(monkeypatch):
    monkeypatch.delenv("NANOCHAT_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_said", set())


def refuse(monkeypatch, reason: str) -> None:
    """Make the CPU backend refuse every operation."""

    def unsupported(*_arguments):
        raise Unsupported(reason)

    real = backends.implementation
    monkeypatch.setattr(
        backends, "implementation", lambda operation, name: unsupported if name == "cpu" else real(operation, name)
    )


def test_the_device_decides_and_the_reference_is_last():
    assert candidates(CPU) == ("cpu", "reference")
    assert candidates(torch.device("cuda")) == ("triton", "reference")
    assert candidates(torch.device("meta")) == ("reference",)


def test_the_variable_overrides_the_device_and_the_argument_the_variable(monkeypatch):
    monkeypatch.setenv("NANOCHAT_BACKEND", "triton")
    assert candidates(CPU) == ("triton", "reference")
    assert candidates(CPU, "cpu") == ("cpu", "reference")
    assert candidates(CPU, "reference") == ("reference",)


@pytest.mark.parametrize(("argument", "source"), [("avx", "backend"), (None, "NANOCHAT_BACKEND")])
def test_an_unknown_name_is_refused_with_the_known_ones(monkeypatch, argument, source):
    monkeypatch.setenv("NANOCHAT_BACKEND", "avx")
    with pytest.raises(ValueError, match=f"{source} = avx does not exist: choose one of reference, cpu, triton"):
        requested_backend(argument)


def test_a_fallback_gives_the_result_of_the_reference_and_is_logged_once_with_its_cause(monkeypatch, caplog):
    refuse(monkeypatch, "no compiler anywhere")
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING, logger="nanochat_kernels"):
        found = [quantize_activations(x) for _ in range(3)]
    assert torch.equal(found[0].codes, quantize_activations(x, backend="reference").codes)
    assert len(caplog.records) == 1
    assert "no compiler anywhere" in caplog.text


def test_an_error_of_the_caller_does_not_cause_a_fallback():
    with pytest.raises(ValueError, match="cannot be split into groups of 100"):
        quantize_activations(torch.zeros(2, 128), 100)


def test_every_operation_exists_in_the_cpu_backend_and_the_reference():
    names = set(backends.load("reference").__all__)
    assert names >= {"ternarize", "ternarize_packed", "ternary_matmul", "unpack", "int8_matmul", "fp8_matmul"}
    for backend in ("cpu", "reference"):
        assert all(callable(getattr(backends.load(backend), name)) for name in names)


FORKING = """
import os, torch
from nanochat_kernels import quantize_activations
x = torch.ones(512, 512)
quantize_activations(x, backend="cpu")
pid = os.fork()
if pid == 0:
    os._exit(0 if quantize_activations(x, backend="cpu").codes.min() == 127 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_forked_process_computes_too():
    """OpenMP's threads do not exist in the child, which must not wait for them."""
    child = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=120, check=True)
    assert child.stdout.strip() == "0"


def test_the_backends_agree_when_one_is_asked_for_by_name():
    generator = torch.Generator().manual_seed(1)
    weight = PackedTernary.pack(ternarize(torch.randn(40, 256, generator=generator)))
    x = torch.randn(5, 256, generator=generator)
    results = [
        ternary_matmul(quantize_activations(x, backend=name), weight, backend=name) for name in ("reference", "cpu")
    ]
    assert torch.equal(*results)
