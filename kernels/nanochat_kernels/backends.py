"""Which backend computes an operation: chosen by argument, by NANOCHAT_BACKEND, or by the tensors' device.

A backend is a module of functions with the names and signatures of `operations`. It raises Unsupported, with the
reason, for what it cannot compute here; the operation then falls back to the next backend, and the logger
`nanochat_kernels` says so once. Knows names and order; leaves the computing to the backends.
"""

import functools
import importlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch

Backend = Literal["reference", "cpu", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
ENVIRONMENT_VARIABLE = "NANOCHAT_BACKEND"

_MODULES: dict[Backend, str] = {
    "reference": "nanochat_kernels.reference.operations",
    "cpu": "nanochat_kernels.cpu.operations",
    "triton": "nanochat_kernels.triton_kernels.operations",
}
_log = logging.getLogger("nanochat_kernels")
_said: set[tuple[str, str]] = set()


class Unsupported(Exception):
    """A backend cannot compute this here; the message is the reason, for the log."""


def requested_backend(backend: str | None = None) -> Backend | None:
    """The argument, else NANOCHAT_BACKEND, else None for automatic. Raises ValueError for an unknown name."""
    name = backend or os.environ.get(ENVIRONMENT_VARIABLE) or None
    if name is None or name in BACKENDS:
        return name
    source = "backend" if backend else ENVIRONMENT_VARIABLE
    raise ValueError(f"{source} = {name} does not exist: choose one of {', '.join(BACKENDS)}")


def usable_backend(device: torch.device, backend: str | None = None) -> Backend | None:
    """The backend for packed weights: the one asked for, else the device's own if it works here, else None.

    None, not the reference: that unpacks on every call, and float weights are faster where nothing compiled exists.
    """
    if (requested := requested_backend(backend)) is not None:
        return requested
    own: Backend = "triton" if device.type == "cuda" else "cpu"
    try:
        module = load(own)
        if own == "cpu":
            module.library()
    except Unsupported as reason:
        report_fallback("packed layers", own, str(reason))
        return None
    return own


def candidates(device: torch.device, backend: str | None = None) -> Sequence[Backend]:
    """Backends in the order they are tried for tensors on `device`; the reference is always last."""
    requested = requested_backend(backend)
    if requested is not None:
        return (requested, "reference") if requested != "reference" else ("reference",)
    if device.type == "cuda":
        return ("triton", "reference")
    if device.type == "cpu":
        return ("cpu", "reference")
    return ("reference",)


def dispatch(operation: str, device: torch.device, backend: str | None, *arguments: Any) -> Any:
    """Compute with the first candidate that can; each cause of a fallback is logged once."""
    for name in candidates(device, backend):
        try:
            return implementation(operation, name)(*arguments)
        except Unsupported as reason:
            report_fallback(operation, name, str(reason))
    raise AssertionError("the reference computes everything")


@functools.cache
def implementation(operation: str, backend: Backend) -> Callable[..., Any]:
    """The function of a backend for an operation. Raises Unsupported if there is none."""
    function = getattr(load(backend), operation, None)
    if function is None:
        raise Unsupported("it does not implement it")
    return function


@functools.cache
def load(backend: Backend) -> Any:
    """The module of a backend. Raises Unsupported if it cannot be imported here."""
    try:
        return importlib.import_module(_MODULES[backend])
    except ImportError as error:
        raise Unsupported(f"cannot import it: {error}") from error


def report_fallback(operation: str, backend: str, reason: str) -> None:
    """Log, once per backend and reason, that something slower computes instead."""
    if (backend, reason) not in _said:
        _said.add((backend, reason))
        _log.warning("backend %s cannot compute %s here (%s): a slower one does", backend, operation, reason)
