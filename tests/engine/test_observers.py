"""Loggers: they record, and never stop a run."""

from __future__ import annotations

import csv
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vitdense.engine.observers import (
    Background,
    JsonLines,
    LogLines,
    Observer,
    Observers,
    ProgressBar,
    Tables,
    TensorBoard,
    console,
    describe,
)
from vitdense.engine.observers.trackers import Tracker


class Broken(Observer):
    """Fails in one of its methods."""

    def __init__(self, method: str) -> None:
        self.method = method
        self._meet("__init__")

    def _meet(self, method: str) -> None:
        if method == self.method:
            raise OSError(f"disk full in {method}")

    def log(self, record: dict) -> None:
        self._meet("log")

    def advance(self, fraction: float) -> None:
        self._meet("advance")

    def finish(self, results: dict) -> None:
        self._meet("finish")

    def close(self) -> None:
        self._meet("close")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_are_valid_and_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    for step in (20, 40, 60):
        lines.log({"kind": "train", "step": step, "loss": math.nan if step == 20 else 0.5})
    with path.open("a") as file:
        file.write('{"kind": "tra')  # the process was killed here
    assert [record["step"] for record in read_resumed(path, 40)] == [20, 40]
    assert read_resumed(path, 40)[0]["loss"] is None
    JsonLines(path)
    assert path.read_text() == ""


def read_resumed(path: Path, step: int) -> list[dict]:
    JsonLines(path, step)
    return read(path)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_tables_grow_columns_and_resume(tmp_path: Path) -> None:
    tables = Tables(tmp_path)
    tables.log({"kind": "train", "step": 20, "loss": 0.5})
    tables.log({"kind": "train", "step": 40, "loss": math.nan, "grad_norm": 2.0})
    tables.log({"kind": "evaluation", "step": 40, "mIoU": 0.25, 'IoU/a "b", c': 1.0})
    tables.log({"kind": "train", "step": 60, "loss": 0.25})
    assert rows(tmp_path / "train.csv") == [
        {"step": "20", "loss": "0.5", "grad_norm": ""},
        {"step": "40", "loss": "", "grad_norm": "2.0"},
        {"step": "60", "loss": "0.25", "grad_norm": ""},
    ]
    assert rows(tmp_path / "evaluation.csv")[0]['IoU/a "b", c'] == "1.0"
    with (tmp_path / "train.csv").open("a") as file:
        file.write("80,0.1")  # the process was killed here
    tables = Tables(tmp_path, 40)
    tables.log({"kind": "train", "step": 50, "loss": 0.125})
    assert [row["step"] for row in rows(tmp_path / "train.csv")] == ["20", "40", "50"]
    assert len(rows(tmp_path / "evaluation.csv")) == 1
    Tables(tmp_path)
    assert not list(tmp_path.glob("*.csv"))


@pytest.mark.parametrize("method", ["__init__", "log", "advance", "finish", "close"])
def test_a_failing_logger_is_left_out_and_said_once(
    method: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "metrics.jsonl"
    observers = Observers([lambda: Broken(method), lambda: JsonLines(path)])
    for step in (1, 2):
        observers.log({"kind": "train", "step": step})
        observers.advance(step / 2)
    observers.finish({"steps": 2})
    observers.close()
    (warning,) = recwarn.list
    said = "a logger is left out:" if method == "__init__" else "Broken failed and is left out:"
    assert str(warning.message) == f"{said} disk full in {method}"
    assert [record["step"] for record in read(path)] == [1, 2]


class Remote(Tracker):
    """A tracker whose network hangs, or fails, in one of its calls."""

    def __init__(self, folder: Path, hangs: str = "", fails: str = "") -> None:
        super().__init__(folder, "run", {})
        self.hangs, self.fails = hangs, fails
        self.seen: list[Any] = []
        self.network = threading.Event()

    def _meet(self, method: str, *seen: Any) -> None:
        if method == self.fails:
            raise ConnectionError(f"no route in {method}")
        if method == self.hangs:
            self.network.wait()
        self.seen.append((method, *seen))

    def start(self) -> None:
        self._meet("start")

    def log(self, record: dict) -> None:
        self._meet("log", record["step"])

    def finish(self, results: dict) -> None:
        self._meet("finish")

    def close(self) -> None:
        self._meet("close")


@pytest.mark.parametrize("method", ["start", "log", "finish", "close"])
def test_a_hanging_network_holds_up_no_training(
    method: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    remote = Remote(tmp_path, hangs=method)
    observers = Observers([lambda: Background(remote, patience=0.01)])
    for step in (1, 2):
        observers.log({"kind": "train", "step": step})
    observers.finish({})
    observers.close()
    (warning,) = recwarn.list
    message = "Remote failed and is left out: it did not take everything within 0.01 s"
    assert str(warning.message) == message
    remote.network.set()


@pytest.mark.parametrize("method", ["start", "log", "finish", "close"])
def test_a_failing_network_is_said_once(
    method: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    observers = Observers([lambda: Background(Remote(tmp_path, fails=method))])
    for step in (1, 2):
        observers.log({"kind": "train", "step": step})
    observers.finish({})
    observers.close()
    (warning,) = recwarn.list
    assert str(warning.message) == f"Remote failed and is left out: no route in {method}"


def test_the_background_keeps_the_order(tmp_path: Path) -> None:
    remote = Remote(tmp_path)
    background = Background(remote)
    for step in range(100):
        background.log({"kind": "train", "step": step})
    background.finish({})
    background.close()
    logs = [("log", step) for step in range(100)]
    assert remote.seen == [("start",), *logs, ("finish",), ("close",)]


def test_tensorboard_has_the_curves(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = TensorBoard(tmp_path)
    board.log({"kind": "evaluation", "step": 5, "mIoU": 0.25, "epoch": 1, "AP": math.nan})
    board.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    (scalar,) = events.Scalars("evaluation/mIoU")
    assert (scalar.step, scalar.value) == (5, 0.25)
    assert events.Tags()["scalars"] == ["evaluation/mIoU", "evaluation/epoch"]


def test_the_bar_shows_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar("demo", 0.5)
    bar.log({"kind": "train", "step": 20, "loss": 1.23456, "lr": 1e-4, "loss/a": 1.0})
    bar.advance(0.75)
    bar.bar.refresh()
    bar.log({"kind": "evaluation", "step": 40, "AP": 0.5, "AP/cat": 0.5})
    bar.close()
    shown = capsys.readouterr().err
    assert "75%" in shown and "loss 1.235" in shown and "step 40 AP 0.5\n" in shown


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(console.time, "strftime", lambda form: "12:00:00")
    yield now


def test_lines_of_a_file_are_few_and_whole(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of 400 s that logs each second: a line in 10 s, and no carriage return."""
    lines = console.console("demo", 0.0, "mIoU")
    assert isinstance(lines, LogLines)
    for step in range(1, 401):
        clock[0] += 1
        lines.advance(step / 400)
        lines.log({"kind": "train", "step": step, "loss": 0.5, "lr": 1e-3})
    lines.log({"kind": "evaluation", "step": 400, "aAcc": 0.5, "mIoU": 0.25, "IoU/cat": 0.25})
    lines.close()
    shown = capsys.readouterr().err
    assert "\r" not in shown
    first, *rest, evaluation = shown.splitlines()
    assert first == "12:00:00   0% demo, from the start"
    assert rest[0] == "12:00:00   0% step 1 loss 0.5 lr 0.001 left 0:06:39"
    assert rest[20] == "12:00:00  50% step 201 loss 0.5 lr 0.001 left 0:03:19"
    assert rest[-1] == "12:00:00 100% step 400 loss 0.5 lr 0.001"
    assert len(rest) == 41
    assert evaluation == "12:00:00 100% evaluation step 400 mIoU 0.25 aAcc 0.5"


def test_lines_of_a_long_run_come_every_five_minutes(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = LogLines("demo", 0.5)
    for step in range(1, 13):
        clock[0] += 100
        lines.advance(0.5 + step * 1e-4)
        lines.log({"kind": "train", "step": step})
    shown = capsys.readouterr().err.splitlines()
    assert shown[0].endswith("50% demo, resumed")
    assert [line.split()[3] for line in shown[1:]] == ["1", "4", "7", "10"]


def test_many_terms_are_left_out_of_the_line() -> None:
    few = {"step": 1, "loss": 3.0, "loss/a": 1.0, "loss/b": 2.0}
    assert describe(few) == "step 1 loss 3 a 1 b 2"
    many = {"step": 1, "loss": 3.0} | {f"loss/{index}": 1.0 for index in range(5)}
    assert describe(many) == "step 1 loss 3"
