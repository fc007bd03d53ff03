"""Whole runs on a handful of small shapes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.small import SEGMENTATION, VIT, Make, assert_same, train_until_killed
from vitdense.config import Config, ConfigError, dump, load
from vitdense.data.base import DataError
from vitdense.engine import build, checkpoint, runtime, stopping
from vitdense.engine import run as run_module
from vitdense.engine import train as train_module
from vitdense.engine.evaluate import evaluate
from vitdense.engine.states import States
from vitdense.engine.tally import NonFiniteLoss
from vitdense.engine.train import train
from vitdense.metrics.base import Metric
from vitdense.models.base import Model
from vitdense.structures import Batch, Frame, Prediction, Target

DETECTION = f"""
model: {VIT}
  head: {{name: detr, width: 16, heads: 2, ffn: 16, queries: 5, encoder_layers: 1,
         decoder_layers: 2}}
data:
  dataset: {{name: shapes, images: 12, size: 32}}
  root: ROOT
  transforms: {{name: detection, size: 32}}
  workers: 0
train: {{steps: 4, batch_size: 2, evaluations: 2, pictures: 2}}
output: OUT
device: cpu
"""


def records(config: Config, kind: str) -> list[dict[str, Any]]:
    lines = (config.output / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def state(config: Config) -> dict[str, Any]:
    return States(config.output / "checkpoints").load()[1]


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Press Ctrl-C during that step."""
    original, done = train_module.step, [0]

    def step(*args: Any) -> None:
        done[0] += 1
        if done[0] == steps:
            signal.raise_signal(signal.SIGINT)
        original(*args)

    monkeypatch.setattr(train_module, "step", step)


@pytest.mark.parametrize(
    ("text", "headline"), [(SEGMENTATION, "mIoU"), (DETECTION, "AP")], ids=["semantic", "boxes"]
)
def test_a_run_leaves_everything_behind(text: str, headline: str, make: Make) -> None:
    config = make(text=text)
    results = train(config)
    written = json.loads((config.output / "results.json").read_text())
    assert written.keys() == results.keys() >= {headline, "images_per_second", "minutes"}
    assert (written["steps"], written["step"] in (2, 4)) == (4, True)
    assert {path.name for path in config.output.iterdir()} >= {
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "model.safetensors",
        "pictures",
        "results.json",
    }
    names = sorted(path.name for path in (config.output / "pictures").iterdir())
    assert names == ["step_000002.jpg", "step_000004.jpg"]
    assert load(config.output / "config.yaml") == config
    assert [record["step"] for record in records(config, "evaluation")] == [2, 4]


@pytest.mark.parametrize("text", [SEGMENTATION, DETECTION], ids=["semantic", "boxes"])
def test_the_saved_model_has_the_numbers_of_results_json(text: str, make: Make) -> None:
    config = make(text=text)
    results = train(config)
    model, meta = checkpoint.load_model(config.output / "model.safetensors")
    data = build.build_data(config)
    place = runtime.start("cpu")
    loader = build.evaluation_loader(config, data, model, place)
    metric = build.build_metric(config, model.task, meta.classes)
    numbers = run_module.finite(evaluate(model, loader, metric, place.device))
    assert numbers == {name: results[name] for name in numbers} == meta.metrics
    assert meta.step == results["step"]
    assert results["parameters"] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_equals_not_stopping(
    workers: int, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, average, optimizer, best and logs, with dropout and augmentation."""
    options = (f"data.workers={workers}", "train.steps=6", "train.evaluations=3")
    whole = make(*options, out="whole")
    train(whole)
    halves = make(*options, out="halves")
    with monkeypatch.context() as patch:
        interrupt_after(patch, steps=3)
        with pytest.raises(KeyboardInterrupt):
            train(halves)
    assert state(halves)["step"] == 3
    train(halves, resume=True)
    expected, found = state(whole), state(halves)
    del expected["elapsed"], expected["evaluated"], found["elapsed"], found["evaluated"]
    assert_same(found, expected)
    assert records(halves, "evaluation") == records(whole, "evaluation")
    for name in ("model.safetensors",):
        ours, theirs = halves.output / name, whole.output / name
        assert checkpoint.read_meta(ours).metrics == checkpoint.read_meta(theirs).metrics


def test_a_lost_process_goes_on_from_its_last_checkpoint(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("train.steps=6", "train.evaluations=1", "train.checkpoint_every=2")
    whole = make(*options, out="whole")
    train(whole)
    killed = make(*options, out="killed")
    train_until_killed(killed, 5, monkeypatch)
    assert state(killed)["step"] == 4
    train(killed, resume=True)
    assert_same(state(killed)["model"], state(whole)["model"])


def test_accumulation_equals_a_larger_batch(make: Make) -> None:
    """For heads whose loss is a mean over pixels, and without batch statistics."""
    options = ("train.steps=3", "model.head.dropout=0", "data.transforms.scale=[1.0, 1.0]")
    large = make(*options, "train.batch_size=4", out="large")
    small = make(*options, "train.batch_size=2", "train.accumulate=2", out="small")
    train(large)
    train(small)
    for ours, theirs in zip(records(small, "train"), records(large, "train"), strict=True):
        for key in ("step", "epoch", "loss", "grad_norm", "lr"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
    theirs = state(large)["model"]
    for name, ours in state(small)["model"].items():
        torch.testing.assert_close(ours, theirs[name], rtol=1e-3, atol=1e-4)


def test_a_faulty_loss_stops_the_run(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitdense.heads.segmentation.linear import LinearHead

    at, original, original_step = [-1], LinearHead.loss, train_module.step

    def step(run: Any, batches: Any) -> None:
        at[0] = run.step
        original_step(run, batches)

    def loss(self: LinearHead, *args: Any) -> dict[str, torch.Tensor]:
        terms = original(self, *args)
        return {name: term * (torch.nan if at[0] == 2 else 1) for name, term in terms.items()}

    monkeypatch.setattr(train_module, "step", step)
    monkeypatch.setattr(LinearHead, "loss", loss)
    config = make("train.evaluations=1", "train.checkpoint_every=1")
    with pytest.raises(NonFiniteLoss, match=r"step 2: .* cross_entropy = nan; images: .*\.jpg, "):
        train(config)
    assert state(config)["step"] == 2


def test_minutes_stretch_schedule_and_evaluations(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes one second, an evaluation a thousand, which do not count."""
    now, original, measure = [0.0], train_module.step, run_module.evaluate

    def step(*args: Any) -> None:
        now[0] += 1
        original(*args)

    def slow(*args: Any) -> dict[str, float]:
        now[0] += 1000
        return measure(*args)

    monkeypatch.setattr(stopping.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(train_module, "step", step)
    monkeypatch.setattr(run_module, "evaluate", slow)
    config = make("train.minutes=0.1", "train.evaluations=3", "schedule.warmup=0")
    results = train(config)
    assert (results["steps"], results["minutes"]) == (6, pytest.approx(0.1))
    assert results["images_per_second"] == pytest.approx(2)
    assert [record["step"] for record in records(config, "evaluation")] == [2, 4, 6]
    rates = {record["step"]: record["lr"] for record in records(config, "train")}
    assert rates[4] == pytest.approx(1e-3 * 0.5)  # its step began at half of the time


def test_evaluations_are_spread(make: Make) -> None:
    config = make("train.steps=7", "train.evaluations=3", "train.pictures=0")
    train(config)
    assert [record["step"] for record in records(config, "evaluation")] == [3, 5, 7]
    assert not (config.output / "pictures").exists()


def test_the_best_is_kept(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.2, 0.5, 0.5, 0.3])
    monkeypatch.setattr(run_module, "evaluate", lambda *args: {"mIoU": next(values)})
    config = make("train.evaluations=4")
    results = train(config)
    assert (results["mIoU"], results["step"], results["steps"]) == (0.5, 3, 4)
    assert checkpoint.read_meta(config.output / "model.safetensors").metrics == {"mIoU": 0.5}


def test_epochs_are_passes_over_the_data(make: Make) -> None:
    """12 images in batches of 2 x 2: three steps each."""
    config = make("train.epochs=1.5", "train.accumulate=2", "train.evaluations=1")
    assert train(config)["steps"] == 5
    assert records(config, "train")[-1]["epoch"] == pytest.approx(5 / 3, abs=1e-3)


def test_a_folder_is_never_overwritten(make: Make) -> None:
    config = make("train.steps=1")
    results = train(config)
    with pytest.raises(ValueError, match="^output: .*already holds a run.*--resume.*output="):
        train(config)
    assert train(config, resume=True)["step"] == results["step"]
    longer = make("train.steps=2")
    assert train(longer, resume=True)["steps"] == 2


def test_resuming_another_model_is_refused(make: Make) -> None:
    train(make("train.steps=1"))
    other = make("train.steps=2", "model.neck.channels=8")
    with pytest.raises(checkpoint.CheckpointError, match="its weights are not this model's"):
        train(other, resume=True)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(precision: str, make: Make) -> None:
    config = make(f"train.precision={precision}", "train.steps=2")
    train(config)
    found = state(config)
    assert all(value.dtype != torch.bfloat16 for value in found["model"].values())
    assert bool(found["scaler"]) == (precision == "fp16")
    assert records(config, "train")[0]["loss"] > 0


def test_splits_of_other_classes_are_refused(make: Make, shapes: Path, tmp_path: Path) -> None:
    config = make(text=DETECTION)
    folder = build.build_data(config).train.folder  # type: ignore[attr-defined]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").symlink_to(folder / "images")
    for split in ("train", "val"):
        content = json.loads((folder / f"annotations/instances_{split}.json").read_text())
        if split == "val":
            content["categories"].append({"id": 99, "name": "heptagon"})
        path = tmp_path / f"annotations/instances_{split}.json"
        path.write_text(json.dumps(content))
    with pytest.raises(Exception, match="differ in their classes: only one of them has heptagon"):
        train(make("data.dataset=coco", f"data.root={tmp_path}", text=DETECTION))


def test_an_absent_device_is_refused(make: Make) -> None:
    with pytest.raises((ValueError, ConfigError), match="device: cuda:7 is not here"):
        train(make("device=cuda:7"))


def test_category_ids_may_be_of_numpy(make: Make) -> None:
    config = make()
    run = run_module.Run(config, runtime.Runtime(torch.device("cpu")))
    run.data.train.category_ids = list(np.arange(1, 1 + len(run.data.train.classes)))
    path = config.output / "model.safetensors"
    checkpoint.save_model(path, run.model, run.meta())
    assert checkpoint.read_meta(path).category_ids == [1, 2, 3, 4, 5, 6]


def test_epochs_that_are_whole_steps_take_no_step_more(make: Make) -> None:
    settings = make("train.steps=null", "train.epochs=100", "train.batch_size=100").train
    assert build.build_length(settings, images=7).steps == 7  # 100 * 0.07 is above that
    assert build.build_length(settings, images=8, world_size=3).steps == 3


class Numbers(Metric):
    """Numbers of numpy and torch, as metrics of one's own may give."""

    headline = "mean"

    def __init__(self, classes: list[str]) -> None:
        super().__init__(classes)
        self.calls: list[str] = []

    def update(self, predictions: list[Prediction], batch: Batch) -> None:
        self.calls.append("update")

    def reset(self) -> None:
        self.calls.append("reset")

    def compute(self) -> dict[str, float]:
        self.calls.append("compute")
        return {"mean": np.mean([0.5, 1.0]), "least": torch.tensor(0.5)}  # type: ignore[dict-item]


def test_an_evaluation_keeps_nothing_of_its_images(tiny_model: Model) -> None:
    metric = Numbers(["a"])
    evaluate(tiny_model, [], metric, torch.device("cpu"))
    assert metric.calls == ["reset", "compute", "reset"]


def test_two_images_of_one_id_are_an_error(tiny_model: Model) -> None:
    """Metrics count an image once, so that one of them would be left out in silence."""
    frame, target = Frame((8, 8), (8, 8), (8, 8)), Target(semantic=torch.zeros(8, 8).long())
    batches = [
        Batch(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [target], [frame], ["a"], [Path(name)])
        for name in ("x/a.jpg", "x/a.jpg", "y/a.jpg")
    ]
    device = torch.device("cpu")
    evaluate(tiny_model, batches[:2], Numbers(["a"]), device)
    with pytest.raises(DataError, match="^y/a.jpg: has the id 'a', and so has x/a.jpg; metrics"):
        evaluate(tiny_model, batches, Numbers(["a"]), device)


def test_a_run_goes_on_whatever_numbers_its_metric_gives(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "build_metric", lambda config, task, classes, *_: Numbers(classes))
    train(make())
    assert train(make("train.steps=6"), resume=True)["step"] == 6
    assert records(make(), "evaluation")[0]["mean"] == 0.75


def test_memory_is_pinned_for_a_gpu_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU beside a busy GPU that would take some of its memory, or fail for lack of it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = make()
    data = build.build_data(config)
    model = build.build_model(config, data)
    for device in ("cpu", "cuda"):
        place = runtime.Runtime(torch.device(device))
        loader = build.evaluation_loader(config, data, model, place).loader
        assert loader.pin_memory == (device == "cuda")


def test_two_processes_equal_one_with_twice_the_batch(make: Make, tmp_path: Path) -> None:
    same = ("train.steps=2", "train.evaluations=1", "train.ema=null", "train.pictures=0")
    same += ("model.head.dropout=0", "data.transforms.scale=[1.0, 1.0]")
    one = make(*same, "train.batch_size=4", out="one")
    train(one)
    two = make(*same, "train.batch_size=2", out="two")
    (tmp_path / "two.yaml").write_text(dump(two))
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    done = subprocess.run(
        [*launch, "-m", "vitdense", "train", str(tmp_path / "two.yaml")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = records(two, "train")[-1], records(one, "train")[-1]
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert ours["epoch"] == theirs["epoch"]
    expected = state(one)["model"]
    for name, value in state(two)["model"].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
    numbers = json.loads((two.output / "results.json").read_text())
    assert numbers["mIoU"] == pytest.approx(records(one, "evaluation")[-1]["mIoU"], abs=0.02)
