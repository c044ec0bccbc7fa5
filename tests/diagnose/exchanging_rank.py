"""One real rank for tests of the plan: `python -m …exchanging_rank PRESET OVERRIDE…`, in the launcher's environment.

Trains three steps on made-up tokens and prints, as JSON, what its connections carried in the last one, by the kernel's
count, and the growth of its peak memory.
"""

import json
import os
import socket
import struct
import sys
from pathlib import Path

import torch

from nanochat_cli.bench.micro.architectures import time_steps
from nanochat_cli.bench.peak_memory import peak_memory
from nanochat_cli.config.load import resolve_config
from nanochat_cli.report.reporter import SilentReporter
from nanochat_cli.training.build import build_state
from nanochat_cli.training.distributed.group import open_group
from nanochat_cli.training.next_token import train_step

ACKNOWLEDGED, RECEIVED = 120, 128
"""Offsets of tcpi_bytes_acked and tcpi_bytes_received in struct tcp_info (linux/tcp.h), 64 bits each."""

SMALL = ["model.vocab_size=320", "model.n_layers=1", "model.dim=128", "model.n_heads=2", "model.n_kv_heads=1"]
SMALL += ["model.ffn_dim=128", "train.batch_size=1", "train.seq_len=32"]


def carried() -> tuple[int, int]:
    """Bytes that all TCP connections of this process have sent, as far as they have arrived, and received."""
    sent = received = 0
    for path in Path("/proc/self/fd").iterdir():
        if not path.is_socket():
            continue
        with socket.socket(fileno=os.dup(int(path.name))) as one:
            if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
                known = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                sent += struct.unpack_from("Q", known, ACKNOWLEDGED)[0]
                received += struct.unpack_from("Q", known, RECEIVED)[0]
    return sent, received


def main(preset: str, *overrides: str) -> dict[str, object]:
    config = resolve_config([preset], None, overrides)
    with open_group(config) as group:
        time_steps(resolve_config(["quickstart"], None, SMALL), compiled=False, steps=1)  # loads what a step needs
        before = peak_memory()
        torch.manual_seed(0)
        state = build_state(config, group.device, SilentReporter(), group=group)
        assert state.owned is not None
        rows = len(state.owned.units) * config.train.batch_size
        tokens = torch.randint(config.model.vocab_size, (rows, config.train.seq_len + 1))
        state.owned.publish()
        counts = []
        for _ in range(3):
            group.share()  # all are as far
            counts.append(carried())
            train_step(state, tokens[:, :-1], tokens[:, 1:])
            state.progress.step += 1
        group.any(False)  # nothing is on its way any more
        counts.append(carried())
        sent, received = (after - earlier for earlier, after in zip(*counts[-2:], strict=True))
        return {"rank": group.rank, "sent": sent, "received": received, "peak_bytes": peak_memory() - before}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
