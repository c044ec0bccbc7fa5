"""One thread a process where several run tests: threads that spin while they wait would take each other's cores."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
