"""What generation needs of a model and of a tokenizer."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from nanochat_cli.config.sections.model import ModelConfig
from nanochat_cli.model.cache import KVCache


class LanguageModel(Protocol):
    """What generation needs of a model: `model.Transformer` and `inference.PackedTransformer` are two."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def next_logits(self, tokens: Tensor, cache: KVCache, /) -> Tensor:
        """Read tokens int64 [B, T] into the cache; logits [B, V] after the last of them.

        A `CacheRows` is read one token of each of its rows.
        """
        ...


class TextTokenizer(Protocol):
    """What generation needs of a tokenizer."""

    @property
    def eos_id(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def never_sampled(self) -> Sequence[int]: ...
    def encode(self, text: str) -> list[int]: ...
    def token_bytes(self, token_id: int, /) -> bytes: ...
