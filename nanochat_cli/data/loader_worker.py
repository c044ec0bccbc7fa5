"""A process that reads ahead: it is sent a batch index and a slot of shared memory, fills the slot, and reports.

Started by `data.async_loader` only. It owns nothing, so that it may be killed at any moment, and ends when its parent
does, which closes the connection.
"""

import mmap
import os
import signal
import traceback
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import NDArray

from nanochat_cli.data.loader_sources import SourceSpec


def main(connection_fd: int, memory_fd: int) -> None:
    """Serve until the other side of the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    with Connection(connection_fd) as connection:
        try:
            _serve(connection, memory_fd)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


def _serve(connection: Connection, memory_fd: int) -> None:
    try:
        spec, slots = connection.recv()
        batches = spec.open()
        memory = map_slots(memory_fd, spec, slots)
    except (EOFError, ConnectionResetError):
        raise
    except Exception:  # noqa: BLE001 - whatever it is, the parent raises it
        connection.send((None, traceback.format_exc()))
        return
    while True:
        index, slot = connection.recv()
        try:
            memory[slot] = batches.batch(index)
            failure = None
        except Exception:  # noqa: BLE001 - whatever it is, the parent raises it
            failure = traceback.format_exc()
        connection.send((index, failure))


def slot_bytes(spec: SourceSpec) -> int:
    return 2 * spec.batch_size * spec.seq_len * np.dtype(np.int64).itemsize


def map_slots(fd: int, spec: SourceSpec, slots: int) -> NDArray[np.int64]:
    """The shared memory as [slots, 2 (inputs, targets), batch_size, seq_len]; closes `fd`, but keeps it mapped."""
    memory = mmap.mmap(fd, slots * slot_bytes(spec))
    os.close(fd)
    return np.frombuffer(memory, dtype=np.int64).reshape(slots, 2, spec.batch_size, spec.seq_len)
