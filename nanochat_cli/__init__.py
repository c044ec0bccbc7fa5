"""nanochat: train, measure, validate and export small ternary (1.58-bit) language models.

From Python (docs/python.md): `train` makes a `Run`, `load` gives a `Model`, `evaluate` measures either. They are
imported when they are first used, so that `import nanochat_cli` costs nothing and needs no torch.
"""

from typing import TYPE_CHECKING

from nanochat_cli.errors import ConfigError, DataError, NanochatError

if TYPE_CHECKING:
    from nanochat_cli.api import Model, Run, evaluate, load, train

__version__ = "0.1.0"
__all__ = ["ConfigError", "DataError", "Model", "NanochatError", "Run", "__version__", "evaluate", "load", "train"]


def __getattr__(name: str) -> object:
    """Import what is in `api` on first use (PEP 562)."""
    if name in __all__:
        from nanochat_cli import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
