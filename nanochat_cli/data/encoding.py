"""Encode a stream of documents on all cores, in order, in bounded memory.

Batches of documents go to worker processes and come back in the order they were sent, so the result does not
depend on the number of workers. Workers are spawned, never forked: the parent may have torch's threads.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanochat_cli.data.chat import render
from nanochat_cli.data.conversations import from_bytes
from nanochat_cli.data.documents import Document
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import DataError

BATCH_BYTES = 512 * 1024
# Batches in flight per worker: one being encoded, one waiting, so that a worker never waits for the reader.
IN_FLIGHT_PER_WORKER = 2
# Starting a worker costs about as much as encoding this much text.
WORTH_A_WORKER = 2 * 1024 * 1024


class EncodedBatch(NamedTuple):
    """`tokens` uint32 [n], an EOS after every document; `lengths` int64 [documents], EOS counted.

    trained: bool [n], of conversations.
    """

    documents: list[bytes]
    tokens: NDArray[np.uint32]
    lengths: NDArray[np.int64]
    trained: NDArray[np.bool_] | None = None


def encode_documents(
    documents: Iterable[bytes], tokenizer: Tokenizer, workers: int, batch_bytes: int = BATCH_BYTES
) -> Iterator[EncodedBatch]:
    """Encode valid UTF-8 `documents` in order; `workers` = 1 stays in this process.

    Memory: a few batches per worker. Raises DataError when a worker dies.
    """
    batches = _batched(documents, batch_bytes)
    if workers == 1:
        for batch in batches:
            yield EncodedBatch(batch, *_encode(tokenizer, batch))
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer.to_str(),),
    )
    waiting: deque[tuple[list[bytes], Future[tuple[NDArray[np.uint32], NDArray[np.int64]]]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode_in_worker, batch)))
            if len(waiting) >= workers * IN_FLIGHT_PER_WORKER:
                sent, future = waiting.popleft()
                yield EncodedBatch(sent, *future.result())
        while waiting:
            sent, future = waiting.popleft()
            yield EncodedBatch(sent, *future.result())
    except BrokenProcessPool as error:
        raise DataError(
            "an encoding process died (out of memory, or a script without `if __name__ == '__main__'`); "
            "set data.workers=1"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def given_tokens(documents: Iterable[Document], eos_id: int) -> Iterator[EncodedBatch]:
    """Documents that hold their tokens, in the form that `encode_documents` gives others."""
    for document in documents:
        assert document.tokens is not None, "documents of token files hold tokens"
        tokens = np.append(document.tokens, np.uint32(eos_id))
        yield EncodedBatch([document.content], tokens, np.array([len(tokens)]))


def encode_conversations(documents: Iterable[bytes], tokenizer: Tokenizer) -> Iterator[EncodedBatch]:
    """Conversations (see `conversations.to_bytes`) as ChatML, in the form that `encode_documents` gives texts.

    `documents` of a batch are the bytes that its tokens stand for.
    """
    for batch in _batched(documents, BATCH_BYTES):
        rendered = render([from_bytes(document) for document in batch], tokenizer)
        lengths = np.array([len(one.tokens) for one in rendered], dtype=np.int64)
        tokens = np.concatenate([one.tokens for one in rendered])
        trained = np.concatenate([one.trained for one in rendered])
        special = set(tokenizer.special_tokens.values())
        texts = [
            tokenizer.decode_bytes(token for token in one.tokens.tolist() if token not in special) for one in rendered
        ]
        yield EncodedBatch(texts, tokens.astype(np.uint32), lengths, trained)


def _batched(documents: Iterable[bytes], batch_bytes: int) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= batch_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, batch: list[bytes]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    encoded = tokenizer.encode_batch([document.decode("utf-8") for document in batch])
    lengths = np.array([len(ids) + 1 for ids in encoded], dtype=np.int64)
    tokens = np.empty(int(lengths.sum()), dtype=np.uint32)
    start = 0
    for ids in encoded:
        tokens[start : start + len(ids)] = ids
        tokens[start + len(ids)] = tokenizer.eos_id
        start += len(ids) + 1
    return tokens, lengths


_worker_tokenizer: Tokenizer | None = None


def _start_worker(definition: str) -> None:
    """Set up a worker: its own tokenizer, no other threads, and an end when the parent ends."""
    global _worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then stops the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = Tokenizer.from_str(definition)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers, which would wait for ever on a queue that nobody fills."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_in_worker(batch: list[bytes]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    if _worker_tokenizer is None:
        raise RuntimeError("the worker was not started by encode_documents")
    return _encode(_worker_tokenizer, batch)
