"""Peak memory of a process, or of a piece of Python in a separate process, since a peak never goes down again."""

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
    """Largest resident set, in bytes, of a process (by its id) so far; 0 if the kernel reports none. Needs Linux.

    Not `ru_maxrss`: that survives exec, so a child would start with its parent's peak.
    """
    found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{process}/status").read_text(encoding="utf-8"))
    return 1024 * int(found[1]) if found else 0


def peak_growth(setup: str, measured: str) -> int:
    """Bytes by which running the statements `measured` raised the peak that the statements `setup` had left.

    Needs Linux. Raises CalledProcessError when they fail.
    """
    code = _MEASURE.format(setup=setup, measured=measured)
    return int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout)
