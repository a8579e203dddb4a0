"""Encode documents in order, in this process or in several."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait

import numpy as np

from mtp_megatron.data.tokenizer import Tokenizer
from mtp_megatron.errors import DataError
from mtp_megatron.signals import children_leave_stopping_to_parent, leave_stopping_to_parent

_BATCH_BYTES = 1 << 20
_worker_tokenizer: Tokenizer | None = None


def encode_documents(
    documents: Iterable[bytes], tokenizer: Tokenizer, workers: int = 1
) -> Generator[np.ndarray, None, None]:
    """Yield each document's ids, ``eod`` included (int32 ``[tokens]``), in the order given.

    Args:
        documents: UTF-8 text; drawn only as fast as results are taken, so memory stays bounded.
        workers: processes; 1 encodes here.

    Raises:
        DataError: a worker process died.
    """
    if workers == 1:
        yield from map(tokenizer.encode_document, documents)
        return
    # spawn: forking a process that has threads (torch, sentencepiece) can deadlock the child.
    context = multiprocessing.get_context("spawn")
    # The pool starts multiprocessing's own helper, and what is submitted the workers.
    with children_leave_stopping_to_parent():
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(tokenizer,))
    pending: deque[Future[list[np.ndarray]]] = deque()
    try:
        for batch in _batches(documents):
            with children_leave_stopping_to_parent():
                pending.append(pool.submit(_encode_batch, batch))
            if len(pending) > 2 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"one of the {workers} worker processes died (out of memory, or killed). Run again with fewer --workers."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _batches(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for data in documents:
        batch.append(data)
        size += len(data)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _start_worker(tokenizer: Tokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer
    # Ctrl-C reaches the whole group, a scheduler's signal every process of the job; the parent ends the workers.
    leave_stopping_to_parent(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Workers wait for work on a pipe that they hold open themselves, so a killed parent has to be noticed here."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        with contextlib.suppress(OSError):
            wait([parent.sentinel])
        os._exit(1)


def _encode_batch(batch: list[bytes]) -> list[np.ndarray]:
    assert _worker_tokenizer is not None
    return [_worker_tokenizer.encode_document(data) for data in batch]
