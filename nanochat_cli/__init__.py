"""nanochat: train, measure, validate and export small ternary (1.58-bit) language models.

From Python: `load` gives a `Model` (docs/python.md). Both are imported when they are first used, so that
`import nanochat_cli` costs nothing and needs no torch.
"""

from typing import TYPE_CHECKING

from nanochat_cli.errors import ConfigError, DataError, NanochatError

if TYPE_CHECKING:
    from nanochat_cli.api import Model, load

__version__ = "0.1.0"
__all__ = ["ConfigError", "DataError", "Model", "NanochatError", "__version__", "load"]


def __getattr__(name: str) -> object:
    """Import `Model` and `load` on first use (PEP 562)."""
    if name in ("Model", "load"):
        from nanochat_cli import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
