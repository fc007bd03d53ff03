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

CHOOSY = hasattr(signal, "sigwaitinfo")
"""Whether a process can learn who sent a signal: not on macOS and Windows."""

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
    """What the loader gives; raises WorkerError where one of its processes has died."""
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
    # a SIGTERM to all waits in those that start until they know whose it is
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM} if CHOOSY else ())
    iterator = iter(loader)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    return iterator


def describe(worker: BaseProcess) -> str:
    """One line about a process that has ended."""
    code = worker.exitcode or 0
    name = signal.Signals(-code).name if code < 0 else ""
    how = f"was killed by {name}" if name else f"ended by itself with the code {code}"
    cause = CAUSES.get(name, "data.workers=0 reads images in the run itself and shows why")
    return f"a process that reads images (pid {worker.pid}) {how}: {cause}"


def heed_main_process(worker: int) -> None:
    """In a worker: end by no signal that was sent to all processes, as launchers do and Ctrl-C.

    The main one still wants batches to finish its step. Only its own SIGTERM counts: a thread waits
    for that, because no handler of Python's knows who sent it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if CHOOSY:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, daemon=True).start()


def _end_when_told() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def count(workers: Workers, cores: int | None = None, gpu: bool | None = None) -> int:
    """Worker processes: with a GPU one for each core up to 8, else at most 2 beside the model.

    Args:
        cores: that this process has for itself; by default all that it may run on.
        gpu: whether the model is on one; by default whether there is one.
    """
    if workers != "auto":
        return workers
    cores = len(own_cores()) if cores is None else cores
    gpu = torch.cuda.is_available() if gpu is None else gpu
    return min(8, cores) if gpu else min(2, cores // 2)


def own_cores() -> set[int]:
    """The cores that this process may run on; other processes may too."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
