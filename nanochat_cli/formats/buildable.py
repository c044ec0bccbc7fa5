"""Models of files from elsewhere, whose metadata may ask for sizes that no memory holds."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nanochat_cli.config.sections.model import ModelConfig
from nanochat_cli.errors import DataError
from nanochat_cli.model.transformer import Transformer


def shapes_of(config: ModelConfig, where: str) -> Transformer:
    """The model without memory and without values. Raises DataError for sizes that cannot be."""
    with buildable(where), torch.device("meta"):
        return Transformer(config)


@contextmanager
def buildable(where: str) -> Iterator[None]:
    """Raises DataError for what torch, or the memory, refuses."""
    try:
        yield
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:  # TypeError: what no int64 holds
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{where}: its sizes cannot be built ({first}); download it again") from error
