"""Compiles the models of later sections into the caches on disk: `python -m benchmarks.gpu_sections.ahead SECTION…`.

`exactness` starts it beside its own work, in which nothing is timed. What it has not done when that section ends, the
later ones do themselves.
"""

import gc
import subprocess
import sys
from collections.abc import Sequence

import torch

from benchmarks.gpu_sections.training import AT_MOST, CONTENDERS, SIZES, Contender, configured


def start(sections: Sequence[str] = tuple(SIZES)) -> None:
    """A process per section, in this one's group, which ends them."""
    for section in sections:
        subprocess.Popen([sys.executable, "-m", __name__, section])


def compile_models(section: str, device: torch.device, *, tiny: bool = False) -> list[str]:
    """One step of each contender; returns the names of those that ran."""
    done = []
    for name in list(CONTENDERS)[: AT_MOST.get(section)]:
        try:
            Contender(configured(section, name, tiny=tiny), device, warm_up=1)
        except Exception as error:  # noqa: BLE001 - the section itself will meet it, and record it
            print(f"{section}, {name}: not compiled ahead: {type(error).__name__}: {error}", flush=True)
            continue
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        print(f"{section}, {name}: compiled ahead", flush=True)
        done.append(name)
    return done


if __name__ == "__main__":
    for section in sys.argv[1:]:
        compile_models(section, torch.device("cuda"))
