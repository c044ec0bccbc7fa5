"""What every test process begins with."""

import os
import signal

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes run tests: threads that spin while they wait would take each other's cores. Before torch.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background by a shell; tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)
