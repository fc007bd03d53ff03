"""The other processes of a run: who they are, and which of them is lost when talking fails."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from vitdense.engine.checkpoint import CheckpointError
from vitdense.engine.stopping import Stopped

TIMEOUT = timedelta(minutes=10)
"""How long processes wait for each other: while the main one writes and draws, they do nothing."""

ROLL_CALL = 3.0
"""Seconds that the others have to say that they are there."""

BROKEN = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out", re.I)
"""What torch's errors say where processes can no longer talk."""


class LostProcess(RuntimeError):
    """Another process has ended or hangs: names it, its machine, and what it last said."""

    status = 75
    """Of this process: EX_TEMPFAIL, which schedulers start again."""


class FailedProcess(RuntimeError):
    """An error of another process, that this one has been told of."""


@contextmanager
def attended() -> Iterator[None]:
    """Inside, an error is told to the other processes, and one of talking becomes `LostProcess`.

    Ends when all processes have come to its end: one that tears down its connections earlier
    would break those of the others.
    """
    if not (dist.is_available() and dist.is_initialized()):
        yield
        return
    peers = Peers()
    try:
        yield
        dist.barrier()
    except Stopped as told:
        peers.leave(told)
        raise
    except Exception as error:
        if is_broken(error):
            raise LostProcess(peers.explain(error)) from error
        peers.leave(error)
        raise


def is_broken(error: BaseException | None) -> bool:
    """Whether it comes from torch's talking; where all write a checkpoint, that is its cause."""
    while isinstance(error, CheckpointError):
        error = error.__cause__
    of_torch = type(error) is RuntimeError or isinstance(error, dist.DistError)
    return of_torch and bool(BROKEN.search(str(error)))


class Peers:
    """What the processes leave for each other to read, beside their collective operations.

    That is a store of torch, which torchrun keeps, and without it the main process.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.store: Any = dist.PrefixStore("peers", dist.distributed_c10d._get_default_store())
        places: list[Any] = [None] * self.world_size
        dist.all_gather_object(places, f"{socket.gethostname()}, process {os.getpid()}")
        self.places = places

    def leave(self, error: BaseException) -> None:
        """Say why this process ends."""
        words = f"{type(error).__name__}: {error}"
        try:
            self.store.set(f"words/{self.rank}", words[:2000])
        except RuntimeError:
            return  # nobody is left to read it

    def explain(self, error: BaseException) -> str:
        """Which process is lost and why, as far as that can be known."""
        try:
            lost = self._missing()
        except RuntimeError:  # the store went with the process that kept it
            lost = {0: "it kept the store by which processes meet"}
        reason = str(error).strip().partition("\n")[0]
        told = [
            f"rank {rank} ({self.places[rank]}) is lost: {words}"
            for rank, words in sorted(lost.items())
        ]
        told = told or [f"all are there, but do not understand each other ({reason})"]
        return (
            f"rank {self.rank} of {self.world_size} ({self.places[self.rank]}) must end too: "
            f"{'; '.join(told)}. The latest checkpoint is safe; go on from it with --resume"
        )

    def _missing(self) -> dict[int, str]:
        """The processes that do not answer, and their last words."""
        self.store.set(f"there/{self.rank}", "1")
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        end = time.monotonic() + ROLL_CALL
        while time.monotonic() < end and not all(map(self._heard, others)):
            time.sleep(0.05)
        words = {rank: self._words(rank) for rank in others}
        causes = {rank: said for rank, said in words.items() if said is not None}
        silent = {
            rank: "it says nothing, as one that hangs, or was killed: by hand, for lack of memory, "
            "or with its machine"
            for rank in others
            if not self._heard(rank)
        }
        return causes or silent

    def _heard(self, rank: int) -> bool:
        return bool(self.store.check([f"there/{rank}"]) or self.store.check([f"words/{rank}"]))

    def _words(self, rank: int) -> str | None:
        if not self.store.check([f"words/{rank}"]):
            return None
        said: str = self.store.get(f"words/{rank}").decode()
        return said
