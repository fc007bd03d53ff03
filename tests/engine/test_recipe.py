"""What a config says about augmentation reaches the batches, whatever the run's length is in."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vitdense.config import Config, loads
from vitdense.engine import build
from vitdense.engine import train as train_module
from vitdense.engine.runtime import Runtime
from vitdense.engine.states import States
from vitdense.engine.train import train
from vitdense.structures import Batch

TEXT = """
model: {{backbone: resnet18, head: {{name: linear}}}}
data:
  dataset: {{name: shapes, images: 24, size: 32}}
  root: {root}
  transforms: {{name: detection, size: 32, mosaic: 0.5, mixup: 0.3, multi_scale: [0.5, 1.5],
               close: {close}}}
  workers: 0
train: {{{length}, batch_size: 4, accumulate: 2}}
seed: 1
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


def sides(config: Config, count: int, start: int = 0, step_seconds: float = 0.0) -> list[int]:
    """Of the canvases of some batches, read by a run whose steps take so long."""
    data = build.build_data(config)
    model = SimpleNamespace(divisor=8)
    read = [start]
    batches: Iterator[Batch] = build.training_loader(
        config,
        data,
        model,  # type: ignore[arg-type]
        Runtime(torch.device("cpu")),
        start,
        elapsed=lambda: step_seconds * (read[0] // 2),
    )
    found = []
    for batch in islice(batches, count):
        read[0] += 1
        found.append(batch.images.shape[-1])
    return found


@pytest.mark.parametrize(
    ("length", "close"),
    [("steps: 12", "0.5"), ("epochs: 4", "0.5"), ("epochs: 4", "2 epochs"), ("steps: 12", "6")],
)
def test_the_last_half_has_one_canvas(root: Path, length: str, close: str) -> None:
    """12 steps of two batches, 4 passes over 24 images."""
    config = loads(TEXT.format(root=root, length=length, close=close), "test.yaml")
    found = sides(config, 24)
    assert set(found[12:]) == {32} and set(found[:12]) == {16, 24, 32, 40, 48}
    assert sides(config, 14, start=10) == found[10:]


def test_in_minutes_the_clock_decides(root: Path) -> None:
    config = loads(TEXT.format(root=root, length="minutes: 2", close="0.5"), "test.yaml")
    found = sides(config, 24, step_seconds=10.0)
    assert set(found[12:]) == {32} and set(found[:12]) == {16, 24, 32, 40, 48}
    assert set(sides(config, 8, start=0, step_seconds=100.0)[2:]) == {32}


def test_a_check_reads_the_first_batch(root: Path) -> None:
    config = loads(TEXT.format(root=root, length="minutes: 2", close="0.1"), "test.yaml")
    assert len(sides(config, 1)) == 1


RUN = """
model:
  backbone: {name: timm, model: resnet18, out_indices: [3],
             options: {layers: [1, 1, 1, 1], channels: [8, 8, 8, 8], stem_width: 8}}
  head: {name: detr, width: 16, heads: 2, ffn: 16, queries: 5, encoder_layers: 1,
         decoder_layers: 1}
data:
  dataset: {name: shapes, task: instance, images: 6, size: 32}
  root: ROOT
  transforms: {name: detection, size: 32, mosaic: 0.5, mixup: 0.5, copy_paste: 0.5,
               multi_scale: [0.5, 1.5], close: 0.3}
  workers: 1
train: {LENGTH, batch_size: 4, ema: 0.9, evaluations: 1, pictures: 0, precision: fp32}
optimizer: {lr: 1e-3, backbone_scale: 0.1, scales: {head.decoder: 0.5}}
schedule: {name: flat_cosine, warmup: 2000, flat: 0.4, tail: 0.3, final: 0.5}
metric: coco
device: cpu
output: OUT
"""


def run_config(root: Path, out: Path, length: str) -> Config:
    text = RUN.replace("ROOT", str(root)).replace("OUT", str(out)).replace("LENGTH", length)
    return loads(text, "test.yaml")


@pytest.mark.parametrize("length", ["steps: 5", "epochs: 2.5", "minutes: 0.005"])
def test_a_whole_recipe_on_a_handful_of_images(root: Path, tmp_path: Path, length: str) -> None:
    results = train(run_config(root, tmp_path, length))
    assert results["steps"] >= 1
    if "minutes" not in length:
        images = len(build.build_data(run_config(root, tmp_path, length)).train)
        expected = 5 if "steps" in length else -(-int(2.5 * images) // 4)
        assert results["steps"] == expected
    losses = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(record["loss"] > 0 for record in losses if record["kind"] == "train")


def test_a_recipe_goes_on_exactly_after_an_interruption(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, halves = (run_config(root, tmp_path / out, "steps: 6") for out in ("whole", "halves"))
    train(whole)
    step, done = train_module.step, [0]

    def interrupted(*args: Any) -> None:
        done[0] += 1
        if done[0] == 3:  # the next batches are already being made
            signal.raise_signal(signal.SIGINT)
        step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(halves)
    train(halves, resume=True)
    states = [States(config.output / "checkpoints").load()[1] for config in (whole, halves)]
    for part in ("model", "ema"):
        ours, theirs = ((s[part].get("model", s[part])) for s in states)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
