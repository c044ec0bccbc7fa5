"""What contenders of `training` learn from the same start on the same bytes, as many steps as there is time for."""

import statistics
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_sections.task import Task
from benchmarks.gpu_sections.training import TWIN, Contender, configured
from nanochat_cli.config.schema import Config
from nanochat_cli.report.result_file import Result, summarise

SIZE = "training-125m"
LEARNING = TWIN, "ternary", "ternary, int8 forward and backward"
"""Fewer than `training` times, so that each has more steps."""
STEPS, FEWEST_STEPS, QUICK_STEPS = 300, 40, 3
LAST_LOSSES = 20
"""Steps whose mean loss is compared at the end of a run."""


def run(task: Task) -> None:
    """Each contender gets the same number of steps, which the first one's rate decides."""
    configs = {name: configured(SIZE, name, tiny=task.quick) for name in LEARNING}
    device, curves = task.device, task.details.setdefault("losses", {})
    steps = QUICK_STEPS
    if not task.quick:
        started = time.monotonic()
        probe = Contender(configs[TWIN], device, warm_up=2)
        starting, tokens = time.monotonic() - started, probe.tokens[:, 1:].numel() / 2
        fits = (task.left() / len(configs) - starting) * probe.tokens_per_second(2) / tokens
        del probe
        if fits < FEWEST_STEPS:
            task.leave_out("all contenders", f"there was time for {max(fits, 0):.0f} steps each")
            return
        steps = min(STEPS, int(fits))
    batches = byte_batches(configs[TWIN], steps).to(device)
    for name, config in configs.items():
        if task.left() < 0:
            task.leave_out(name, "no time was left")
            continue
        with task.attempt(name):
            curves[name] = train_contender(config, device, batches)
            task.add([compared(name, curves, steps)])
        if task.cuda:
            torch.cuda.empty_cache()


def compared(name: str, curves: dict[str, list[float]], steps: int) -> Result:
    case = f"{name}, {steps} steps on bytes of the standard library"
    metric = f"mean loss of the last {LAST_LOSSES} steps"
    peer, peers = (TWIN, [end(curves[TWIN])]) if name != TWIN and TWIN in curves else (None, None)
    return summarise(case, metric, "nats", [end(curves[name])], peer=peer, peer_runs=peers, smaller_is_better=True)


def train_contender(config: Config, device: torch.device, batches: Tensor) -> list[float]:
    """The losses in nats of a run from its start on int64 [steps, B, T + 1]."""
    contender = Contender(config, device, warm_up=0)
    return [contender.step(batch, step, len(batches)) for step, batch in enumerate(batches)]


def end(losses: Sequence[float]) -> float:
    return statistics.mean(losses[-LAST_LOSSES:])


def byte_batches(config: Config, steps: int) -> Tensor:
    """Bytes of the standard library's sources as tokens: int64 [steps, B, T + 1], repeated if there are too few."""
    shape = (steps, config.train.batch_size, config.train.seq_len + 1)
    needed = shape[0] * shape[1] * shape[2]
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= needed:
            break
    data = torch.frombuffer(text, dtype=torch.uint8).to(torch.int64)
    return data.repeat(-(-needed // len(data)))[:needed].reshape(shape)
