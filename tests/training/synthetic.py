"""A tiny model and synthetic data for tests of the training loop."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanochat_cli.config.schema import Config

VOCAB = 64


class SyntheticData:
    """Sequences that count upwards with a random stride: learnable in a few steps, a pure function of the step."""

    def __init__(self, rows: int, seq_len: int) -> None:
        self.rows, self.seq_len = rows, seq_len
        self.token_bytes = torch.full((VOCAB,), 2)
        self.token_bytes[0] = 0
        self.document_end: int | None = None
        self.read: list[int] = []

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        self.read.append(step)
        return self._sequences(step, self.rows)

    def scores(self, step: int) -> Tensor | None:
        return None

    def shift(self, windows: int) -> None:
        self.shifted = windows

    def is_ready(self, step: int) -> bool:
        return False

    def close(self) -> None:
        pass

    def held_out_batches(self, max_tokens: int | None) -> int:
        return 1

    def held_out(self, max_tokens: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        yield self._sequences(10**6, 4)

    def pieces(self) -> Iterator[NDArray[np.int64]]:
        rows = [torch.cat((inputs, targets[:, -1:]), dim=1) for inputs, targets in (self.batch(s) for s in range(50))]
        return (row.numpy() for row in torch.cat(rows))

    def _sequences(self, seed: int, rows: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randint(0, VOCAB, (rows, 1), generator=generator)
        stride = torch.randint(1, 4, (rows, 1), generator=generator)
        tokens = (start + stride * torch.arange(self.seq_len + 1)) % VOCAB
        return tokens[:, :-1], tokens[:, 1:]


def tiny_config(run_dir: Path, **sections: dict[str, object]) -> Config:
    """A model of two layers of width 64; sections are merged over it."""
    base: dict[str, dict[str, object]] = {
        "run": {"dir": str(run_dir), "name": "tiny"},
        "model": {
            "vocab_size": VOCAB,
            "dim": 64,
            "n_layers": 2,
            "n_heads": 2,
            "n_kv_heads": 1,
            "ffn_dim": 64,
            "max_seq_len": 16,
            "qk_norm": True,
            "embedding_std": 0.8,
            "head_std": 0.001,
        },
        "train": {
            "total_steps": 12,
            "batch_size": 4,
            "grad_accum": 2,
            "seq_len": 16,
            "compile": "off",
            "device": "cpu",
            "log_interval": 1,
        },
        "eval": {"interval": 5},
        "optim": {"warmup_steps": 2},
        "checkpoint": {"interval": 4},
        "telemetry": {"interval": 3, "tensorboard": False},
    }
    for name, section in sections.items():
        base[name] = base.get(name, {}) | section
    return Config.model_validate(base)
