"""A language model that writes prescribed texts through the real sampler, for tests of evaluation."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nanochat_cli.config.schema import ModelConfig
from nanochat_cli.model.cache import CacheRows, KVCache


class ByteTokenizer:
    """One token per byte of UTF-8; 0 ends a document."""

    eos_id = 0
    bos_id = None
    never_sampled = ()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int, /) -> bytes:
        return bytes([token_id])


class Author:
    """Answers each prompt with a text and EOS; `read` lists the prompts in the order in which they came.

    Sample r of a prompt is the r-th of several answers, over and over; they must begin with the same character.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, answers: Mapping[str, str | list[str]], context: int = 2048) -> None:
        shape = {"vocab_size": 256, "dim": 64, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "ffn_dim": 64}
        self.config = ModelConfig.model_validate({**shape, "max_seq_len": context})
        self.answers, self.read = answers, list[str]()
        self._start, self._samples, self._scripts = 0, 0, list[bytes]()

    def next_logits(self, tokens: Tensor, cache: KVCache, /) -> Tensor:
        if tokens.shape[1] > 1:  # a prompt
            self.read.append(bytes(tokens[0].tolist()).decode())
            answer = self.answers[self.read[-1]]
            self._scripts = [f"{text}\0".encode() for text in ([answer] if isinstance(answer, str) else answer)]
            self._start, self._samples = cache.length + tokens.shape[1], 0
        cache.advance(tokens.shape[1])
        rows = cache.rows if isinstance(cache, CacheRows) else [cache]
        logits = torch.full((len(tokens), 256), -1e4)
        for place, row in enumerate(rows):
            written = row.length - self._start
            if written == 1:  # a sample begins, and notes in its memory which one it is
                row.keys[0, 0, 0, 0, 0] = self._samples
                self._samples += 1
            script = self._scripts[int(row.keys[0, 0, 0, 0, 0]) % len(self._scripts) if written else 0]
            logits[place, script[written] if written < len(script) else 0] = 1e4
        return logits
