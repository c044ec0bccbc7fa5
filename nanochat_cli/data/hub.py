"""Data sets of the Hugging Face Hub: one attempt, and an error of one line without a network."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nanochat_cli.errors import DataError

PATIENCE = 4.0
"""Seconds to wait for the hub's answer."""
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def load_rows(source: str, hint: str, *arguments: Any, **keywords: Any) -> Any:
    """`datasets.load_dataset(*arguments, **keywords)`; without a network from the cache, and without retries.

    Raises DataError, which names `source` and ends in `hint`.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    unreachable = None if Path(str(arguments[0])).is_dir() else _unreachable()
    try:
        with _offline(unreachable is not None):
            return datasets.load_dataset(*arguments, **keywords)
    except (OSError, ValueError, DatasetsError) as error:
        if unreachable:
            raise DataError(
                f"{source}: cannot load: no connection to {unreachable}, and not in the cache; {hint}"
            ) from error
        raise DataError(f"{source}: cannot load: {' '.join(str(error).split())}; {hint}") from error


def _unreachable() -> str | None:
    """The hub's host if it does not answer; None if it does, or behind a proxy, where this cannot be tested."""
    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").netloc
    if any(name in os.environ for name in _PROXIES):
        return None
    name, _, port = host.partition(":")
    try:
        socket.create_connection((name, int(port or 443)), PATIENCE).close()
    except (OSError, ValueError):
        return host
    return None


@contextmanager
def _offline(really: bool) -> Iterator[None]:
    """Set the switch inside both libraries: they read the environment on import, which may have been long ago."""
    import datasets.config
    from huggingface_hub import constants

    switches: tuple[Any, ...] = (constants, datasets.config)
    before = [module.HF_HUB_OFFLINE for module in switches]
    try:
        for module, value in zip(switches, before, strict=True):
            module.HF_HUB_OFFLINE = really or value
        yield
    finally:
        for module, value in zip(switches, before, strict=True):
            module.HF_HUB_OFFLINE = value
