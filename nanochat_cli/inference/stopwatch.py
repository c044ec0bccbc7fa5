"""How fast a model reads and writes: a language model around another that counts tokens and seconds."""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanochat_cli.config.sections.model import ModelConfig
from nanochat_cli.inference.language_model import LanguageModel
from nanochat_cli.model.cache import KVCache


@dataclass
class Rate:
    """Tokens and the seconds they took."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """None before there was a token."""
        return self.tokens / self.seconds if self.seconds > 0 else None


@dataclass
class Stopwatch:
    """Passes everything on to `model`. prompt: tokens read several at a time; new: those read one by one."""

    model: LanguageModel
    prompt: Rate = field(default_factory=Rate)
    new: Rate = field(default_factory=Rate)

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def next_logits(self, tokens: Tensor, cache: KVCache, /) -> Tensor:
        started = time.perf_counter()
        logits = self.model.next_logits(tokens, cache)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        rate = self.new if tokens.shape[1] == 1 else self.prompt
        rate.tokens += tokens.numel()
        rate.seconds += time.perf_counter() - started
        return logits
