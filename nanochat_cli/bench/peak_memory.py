"""Peak memory of a piece of Python, in a process of its own: a process never gives back what it once needed."""

import subprocess
import sys

_MEASURE = """
import re
from pathlib import Path
def peak():  # not ru_maxrss: that survives exec and would be the peak of whoever started this process
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
{setup}
before = peak()
{measured}
print((peak() - before) * 1024)
"""


def peak_growth(setup: str, measured: str) -> int:
    """Bytes by which the resident set grew at most while `measured` ran, beyond what it held after `setup`.

    Both are statements. Needs Linux. Raises CalledProcessError when they fail.
    """
    code = _MEASURE.format(setup=setup, measured=measured)
    return int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout)
