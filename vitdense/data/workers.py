"""The loader's processes: how many, which signals they heed, and what is said when one dies."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from vitdense.data.base import DataError

Workers = int | Literal["auto"]

DYING = 5.0
"""Seconds from the loss of a connection to the end of a process."""

CAUSES = {
    "SIGKILL": "mostly the system, when memory is full: set data.workers or train.batch_size lower",
    "SIGBUS": "no shared memory is left for its batches: set data.workers lower, or give more "
    "(docker run --shm-size=8g, or --ipc=host)",
    "SIGSEGV": "a library crashed while it decoded or changed an image: with data.workers=0 the "
    "run itself stops at that image",
}
"""Why a process ends by a signal, and what to do."""


class WorkerError(DataError):
    """A process that makes batches died: says how, the likely cause and the remedy."""


def iterate(loader: DataLoader) -> Iterator[Any]:
    """What the loader gives; where one of its processes is dead, that is the error."""
    iterator = _start(loader)
    workers: list[BaseProcess] = getattr(iterator, "_workers", [])
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            # What one notices of the death varies: a lost connection, a wait in vain.
            if dead := _dead(workers, DYING if isinstance(error, OSError | EOFError) else 0.0):
                raise WorkerError(describe(dead[0])) from error
            raise
        yield item


def _dead(workers: list[BaseProcess], patience: float) -> list[BaseProcess]:
    """Those that have ended; one may still be about to, after its connections."""
    for sentinel in wait([worker.sentinel for worker in workers], patience) if workers else []:
        for worker in workers:
            if worker.sentinel == sentinel:
                worker.join(DYING)
    return [worker for worker in workers if not worker.is_alive()]


def _start(loader: DataLoader) -> Iterator[Any]:
    """An iterator whose workers' deaths are noticed when the next batch is asked for.

    Torch would raise at any place, in the middle of an optimizer's step too, from a handler of
    SIGCHLD. Without it, whoever waits for a batch looks every five seconds whether all are alive.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    return iterator


def describe(worker: BaseProcess) -> str:
    """One line about a process that has ended."""
    code = worker.exitcode or 0
    name = signal.Signals(-code).name if code < 0 else ""
    how = f"was killed by {name}" if name else f"ended by itself with the code {code}"
    cause = CAUSES.get(name, "data.workers=0 reads images in the run itself and shows why")
    return f"a process that reads images (pid {worker.pid}) {how}: {cause}"


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process; the main one still wants batches to finish its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def count(workers: Workers) -> int:
    """Worker processes: with a GPU its share of the cores up to 8, else fewer than the model."""
    if workers != "auto":
        return workers
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        cores = len(os.sched_getaffinity(0))
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(8, share) if torch.cuda.is_available() else min(2, share // 2)
