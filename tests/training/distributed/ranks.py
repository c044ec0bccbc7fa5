"""Runs on several ranks for tests: real processes, as a user starts them."""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[3]
LINES = "tests.training.distributed.lines"
TINY = """
model.vocab_size=300 model.dim=128 model.n_layers=2 model.n_heads=2 model.n_kv_heads=1 model.ffn_dim=128
model.max_seq_len=32 train.time_budget=none train.total_steps=4 train.batch_size=2 train.grad_accum=4 train.seq_len=32
train.compile=off train.log_interval=1 optim.warmup_steps=2 bigram_init.steps=0 eval.interval=2 eval.max_tokens=128
eval.final_max_tokens=128 checkpoint.interval=2 telemetry.interval=3 telemetry.tensorboard=false optim.muon_format=fp32
train.backward=exact train.attention=torch distributed.mode=owned data.source=corpus
"""
"""Four units a step, which 1 to 4 ranks share; every rank is to use the same formats, so none is measured."""


started: "list[subprocess.Popen[str]]" = []


def line(name: str, settings: str = "") -> list[str]:
    """Arguments of `nanochat` for a new run."""
    assignments = [part for setting in f"{TINY} {settings}".split() for part in ("--set", setting)]
    return ["train", "--quiet", "--preset", "quickstart", "--preset", "cpu", *assignments, "--name", name]


def resumed(name: str, settings: str) -> list[str]:
    """Arguments of `nanochat` to go on with a run."""
    return ["train", "--quiet", "--resume", f"runs/{name}", *(p for s in settings.split() for p in ("--set", s))]


def start(folder: Path, ranks: int, lines: Sequence[Sequence[str]]) -> "subprocess.Popen[str]":
    """Begin the lines in `folder`, one after the other, on so many ranks; without a launcher on one."""
    file = folder / f"lines-{ranks}.json"
    file.write_text(json.dumps(lines))
    return python(folder, *(launcher(ranks) if ranks > 1 else ()), "-m", LINES, str(file))


def start_two(folder: Path, lines: Sequence[Sequence[str]]) -> "subprocess.Popen[str]":
    """Begin the lines as two ranks without a launcher, which would take as long to start as they do."""
    (folder / "lines.json").write_text(json.dumps(lines))
    with ExitStack() as open_now:
        servers = [open_now.enter_context(socket.create_server(("localhost", 0))) for _ in lines]
        ports = [str(server.getsockname()[1]) for server in servers]
    return python(folder, "-m", LINES, "lines.json", *ports)


def nanochat(folder: Path, ranks: int, arguments: Sequence[str]) -> "subprocess.Popen[str]":
    """Begin `nanochat ARGUMENTS --nproc RANKS`."""
    return python(folder, "-m", "nanochat_cli", *arguments, "--nproc", str(ranks))


def launcher(ranks: int, *options: str) -> Sequence[str]:
    """Arguments of Python for torchrun."""
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *options)


def python(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    started.append(process)
    return process


def ended(process: "subprocess.Popen[str]") -> str:
    """Wait until all lines are done well; what they said on standard error."""
    said = process.communicate()[1]
    assert process.returncode == 0, said[-4000:]
    return said


def latest(run: Path) -> Path:
    """The folder of a run's latest checkpoint."""
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()


def contents(run: Path) -> dict[str, str]:
    """SHA-256 of all tensors of the latest checkpoint, by its part, in however many files it is."""
    parts: dict[str, dict[str, bytes]] = {}
    for file in sorted(latest(run).glob("*.safetensors")):
        part = parts.setdefault(re.sub(r"-\d{5}-of-\d{5}$", "", file.stem), {})
        for name, tensor in load_file(file).items():
            assert name not in part, f"{file}: {name} is in two files"
            part[name] = f"{name} {tensor.dtype} {tensor.shape}".encode() + tensor.tobytes()
    return {part: hashlib.sha256(b"".join(of[name] for name in sorted(of))).hexdigest() for part, of in parts.items()}


def measured(run: Path) -> list[dict[str, float]]:
    """The metrics of a run, without what a clock decides."""
    timed = ("seconds", "throughput/")
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in one.items() if not name.startswith(timed)} for one in lines]
