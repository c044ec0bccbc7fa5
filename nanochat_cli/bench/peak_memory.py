"""Peak memory of a process, and of a piece of Python in a process of its own: no process gives back what it needed."""

import re
import subprocess
import sys
from pathlib import Path

_MEASURE = """
from nanochat_cli.bench.peak_memory import peak_memory
{setup}
before = peak_memory()
{measured}
print(peak_memory() - before)
"""


def peak_memory(process: int | str = "self") -> int:
    """Bytes: the largest resident set of a process (its number) so far; 0 when it has none. Needs Linux.

    Not `ru_maxrss`: that survives exec, and in a child it would be the peak of whoever started it.
    """
    found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{process}/status").read_text(encoding="utf-8"))
    return 1024 * int(found[1]) if found else 0


def peak_growth(setup: str, measured: str) -> int:
    """Bytes by which the resident set grew at most while `measured` ran, beyond what it held after `setup`.

    Both are statements. Needs Linux. Raises CalledProcessError when they fail.
    """
    code = _MEASURE.format(setup=setup, measured=measured)
    return int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout)
