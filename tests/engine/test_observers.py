"""Loggers: they record, and never stop a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from vitdense.engine.observers import (
    JsonLines,
    Observer,
    Observers,
    ProgressBar,
    TensorBoard,
    describe,
)


class Broken(Observer):
    def log(self, record: dict) -> None:
        raise OSError("disk full")


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


def test_a_failing_logger_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"

    def unavailable() -> Observer:
        raise ImportError("no tensorboard")

    with pytest.warns(UserWarning, match="a logger is left out: no tensorboard"):
        observers = Observers([unavailable, Broken, lambda: JsonLines(path)])
    with pytest.warns(UserWarning, match="Broken failed and is left out: disk full"):
        observers.log({"kind": "train", "step": 1})
    observers.log({"kind": "train", "step": 2})
    assert [record["step"] for record in read(path)] == [1, 2]


def test_tensorboard_has_the_curves(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = TensorBoard(tmp_path)
    board.log({"kind": "evaluation", "step": 5, "mIoU": 0.25, "epoch": 1})
    board.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    (scalar,) = events.Scalars("evaluation/mIoU")
    assert (scalar.step, scalar.value) == (5, 0.25)


def test_the_bar_shows_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar("demo", 0.5)
    bar.log({"kind": "train", "step": 20, "loss": 1.23456, "lr": 1e-4, "loss/a": 1.0})
    bar.advance(0.75)
    bar.log({"kind": "evaluation", "step": 40, "AP": 0.5, "AP/cat": 0.5})
    bar.close()
    shown = capsys.readouterr().err
    assert "75%" in shown and "loss 1.235" in shown and "step 40 AP 0.5\n" in shown


def test_many_terms_are_left_out_of_the_line() -> None:
    few = {"step": 1, "loss": 3.0, "loss/a": 1.0, "loss/b": 2.0}
    assert describe(few) == "step 1 loss 3 a 1 b 2"
    many = {"step": 1, "loss": 3.0} | {f"loss/{index}": 1.0 for index in range(5)}
    assert describe(many) == "step 1 loss 3"
