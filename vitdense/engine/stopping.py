"""Time and interruption: a stopwatch that can be paused, a Ctrl-C that waits for the step."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

STOPPED = "stopped, all is saved; go on with --resume"


class Stopwatch:
    """Seconds that passed while it ran; it stands still until started."""

    def __init__(self) -> None:
        self._kept = 0.0
        self._since: float | None = None

    @property
    def elapsed(self) -> float:
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._kept + running

    def start(self) -> None:
        """Go on from what it shows."""
        self.set(self.elapsed)
        self._since = time.perf_counter()

    def set(self, elapsed: float) -> None:
        """Stand still at `elapsed` seconds."""
        self._kept, self._since = elapsed, None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside takes no time."""
        self.set(self.elapsed)
        try:
            yield
        finally:
            self.start()


class Stopped(KeyboardInterrupt):
    """Told to stop, with nothing lost: the same command with --resume goes on."""

    status = 75
    """Of the process: EX_TEMPFAIL, which schedulers start again."""


class StopSignal:
    """Inside, the first SIGINT or SIGTERM only sets `requested`; a second SIGINT interrupts."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._waits = True
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self._waits:
            raise Stopped(STOPPED)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside this, signals raise Stopped: nothing under way is worth waiting for."""
        if self.requested:
            raise Stopped(STOPPED)
        self._waits = False
        try:
            yield
        finally:
            self._waits = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
