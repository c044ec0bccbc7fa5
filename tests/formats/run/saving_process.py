"""Server of `test_checkpoints`: for every line `FIRST_STEP` on stdin, forks a child that saves until it is killed.

Prints `child PID`, and `saved STEP` after each save has returned. Forking spares the import of torch for every child.
"""

import os
import sys
from pathlib import Path

import torch

from nanochat_cli.formats.run import checkpoints

MODEL = {"dim": 8}


def tensors_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    """The content of a step's checkpoint: a function of the step, so that a reader would notice a mixture of two."""
    weight = torch.arange(4096, dtype=torch.float32).view(64, 64) * step + 0.5
    return {"model": {"weight": weight}, "optimizer": {"momentum": -weight}}


def save_forever(run_dir: Path, first_step: int) -> None:
    # Ten steps, over and over: most saves replace a checkpoint of the same step, which is the harder case.
    for count in range(first_step, sys.maxsize):
        checkpoints.save(
            run_dir, count % 10, tensors_of(count), {"count": count}, model_config=MODEL, best=count % 3 == 0
        )
        checkpoints.prune(run_dir, keep_last=2)
        os.write(1, f"saved {count}\n".encode())


if __name__ == "__main__":
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            save_forever(Path(sys.argv[1]), int(line))
        os.write(1, f"child {child}\n".encode())
        os.waitpid(child, 0)
        os.write(1, b"dead\n")
