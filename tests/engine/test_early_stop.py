"""Runs that end when evaluations get no better, and runs whose loggers fail."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest

from tests.engine.small import Make, train_until_killed
from vitdense.engine import run as run_module
from vitdense.engine import train as train_module
from vitdense.engine.best import Best
from vitdense.engine.check import check
from vitdense.engine.observers import Tables, TensorBoard
from vitdense.engine.run import Run
from vitdense.engine.runtime import Runtime
from vitdense.engine.train import train

OVERRIDES = (
    "data.dataset.images=6",
    "train.steps=8",
    "train.batch_size=1",
    "train.ema=null",
    "train.evaluations=8",
    "train.pictures=1",
    "train.patience=2",
    "train.observers=[csv]",
)


@pytest.fixture
def make(make: Make) -> Make:
    """Eight steps, an evaluation after each."""
    return lambda *overrides, out="run": make(*OVERRIDES, *overrides, out=out)


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the evaluations after each step find, in place of the metric."""
    values = [0.1, 0.3, 0.2, 0.4, 0.4, 0.3, 0.5, 0.6]

    original, place = train_module.step, [0]

    def step(run: Run, batches: Any) -> None:
        place[0] = run.step
        original(run, batches)

    def evaluate(*args: Any) -> dict[str, float]:
        value = values[place[0]]
        return {"mIoU": value, "ECE": value, "IoU/circle": 1 - value}

    monkeypatch.setattr(train_module, "step", step)
    monkeypatch.setattr(run_module, "evaluate", evaluate)
    return values


def test_a_run_ends_when_it_gets_no_better(
    make: Make, scores: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    config = make()
    results = train(config)
    assert (results["step"], results["steps"], results["stopped_early"]) == (5, 6, True)
    assert results["mIoU"] == 0.4
    assert json.loads((config.output / "results.json").read_text()) == results
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        f"{config.output}: mIoU 0.4, from step 5; stopped early at step 6, because 2 evaluations "
        "in a row were no better (train.patience)"
    )
    assert "--resume" not in said
    assert train(config, resume=True) == results
    longer = train(make("train.patience=3"), resume=True)
    assert (longer["step"], longer["steps"], longer["stopped_early"]) == (8, 8, False)


def test_a_run_that_nothing_measures_says_so(
    make: Make, scores: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    scores[:] = [float("nan")] * 8
    config = make("train.patience=null")
    assert train(config)["mIoU"] is None
    assert (config.output / "model.safetensors").is_file()
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"{config.output}: mIoU undefined for want of ground truth, from step 8"


def test_the_count_goes_on_after_a_resumption(
    make: Make, scores: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies in step 6, when one evaluation of two was no better."""
    config = make()
    train_until_killed(config, 5, monkeypatch)
    results = train(config, resume=True)
    assert (results["step"], results["steps"], results["stopped_early"]) == (5, 6, True)
    whole = train(make(out="whole"))
    ours, theirs = (
        {key: value for key, value in it.items() if key not in ("minutes", "images_per_second")}
        for it in (results, whole)
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("best", "step", "ends"), [("IoU/circle", 1, 3), ("ECE", 1, 3), ("mIoU", 5, 6)]
)
def test_any_number_may_decide(
    best: str, step: int, ends: int, make: Make, scores: list[float]
) -> None:
    """ECE is better the lower it is."""
    results = train(make(f"train.best={best}", "metric={name: miou, calibration: true}"))
    assert (results["step"], results["steps"]) == (step, ends)


def test_an_unknown_number_is_refused_before_the_first_step(make: Make) -> None:
    config = make("train.best=mIOU")
    for command in (train, check):
        with pytest.raises(ValueError, match="train.best: no number is called 'mIOU'. Did you"):
            command(config)
    assert not (config.output / "metrics.jsonl").exists()


def test_processes_agree_on_the_best(make: Make, scores: list[float]) -> None:
    """One whose own numbers differ in the last digits follows the main process."""

    class Second(Runtime):
        def agree(self, value: Any) -> Any:
            return Best(1, {"mIoU": 0.5}, 2) if isinstance(value, Best) else value

    config = make()
    run = Run(config, Second(run_module.torch.device("cpu")))
    run.evaluate()
    assert run.best.waited == 2 and run.done and run.stopped_early


@pytest.mark.parametrize("method", ["__init__", "log", "advance", "finish", "close"])
def test_a_run_outlives_its_loggers(
    method: str, make: Make, scores: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise OSError("disk full")

    config = make("train.steps=2", "train.evaluations=2", "train.observers=[csv, csv, tensorboard]")
    for kind in (Tables, TensorBoard):
        monkeypatch.setattr(kind, method, fail)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        results = train(config)
    assert results["steps"] == 2 and (config.output / "results.json").exists()
    lines = [
        json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [1, 2]
    assert sum("disk full" in str(warning.message) for warning in said) == 2


def test_libraries_that_are_missing_stop_no_run(
    make: Make, scores: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("wandb", "mlflow", "torch.utils.tensorboard"):
        monkeypatch.setitem(run_module.sys.modules, name, None)
    config = make("train.steps=1", "train.observers=[wandb, mlflow, tensorboard]")
    with pytest.warns(UserWarning) as said:
        assert train(config)["steps"] == 1
    text = " ".join(str(warning.message) for warning in said)
    assert all(f"vitdense[{extra}]" in text for extra in ("wandb", "mlflow", "log"))


def test_tables_are_written_beside_the_lines(make: Make, scores: list[float]) -> None:
    config = make("train.steps=2", "train.evaluations=2")
    train(config)
    head, *rows = (config.output / "evaluation.csv").read_text().splitlines()
    assert head == "step,mIoU,ECE,IoU/circle"
    assert [row.split(",")[:2] for row in rows] == [["1", "0.1"], ["2", "0.3"]]
    assert not (config.output / "tensorboard").exists()


def test_an_observer_that_is_not_known_is_refused(make: Make) -> None:
    with pytest.raises(Exception, match="tensorboard"):
        make("train.observers=[tensorbord]")
