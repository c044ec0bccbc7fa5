"""The process of one section of `benchmarks/gpu.py`: `python -m benchmarks.gpu_sections.run SECTION FOLDER UNTIL`."""

import argparse
import importlib
import os
import sys
from pathlib import Path

from benchmarks.gpu_sections.task import Task

MODULES = {
    "exactness": "exactness",
    "roofline": "roofline",
    "forms": "forms",
    "training-125m": "training",
    "training-1b": "training",
    "e3": "e3",
    "decode": "decode",
    "losses": "losses",
}
"""The file of a section; each has a function `run`."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=MODULES)
    parser.add_argument("out", type=Path)
    parser.add_argument("until", type=float, help="when to end, on the monotonic clock")
    parser.add_argument("--device", required=True)
    parser.add_argument("--carried", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA device here; test the script with --device cpu --quick")
        return 2
    task = Task(
        arguments.section,
        arguments.out / f"{arguments.section}.json",
        torch.device(arguments.device),
        arguments.until,
        arguments.carried,
        quick=arguments.quick,
    )
    importlib.import_module(f"benchmarks.gpu_sections.{MODULES[arguments.section]}").run(task)
    return task.finish()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # without waiting for pools and compilers, which `gpu.py` ends
