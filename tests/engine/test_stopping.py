"""Clock and Ctrl-C."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest

from vitdense.engine import stopping
from vitdense.engine.stopping import StopSignal, Stopwatch


def test_a_paused_watch_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(value=100.0)
    monkeypatch.setattr(stopping.time, "perf_counter", lambda: now.value)
    watch = Stopwatch()
    now.value += 5
    assert watch.elapsed == 0
    watch.start()
    now.value += 3
    with watch.paused():
        now.value += 50
        assert watch.elapsed == 3
    now.value += 1
    assert watch.elapsed == 4
    watch.set(60.0)
    now.value += 9
    assert watch.elapsed == 60


def test_the_first_signal_waits_the_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_being_told_to_end_is_a_request_too() -> None:
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGTERM)
    assert stop.requested
