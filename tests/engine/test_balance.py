"""What a config asks for rare classes reaches loss and batches; numbers reach the results."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from vitdense.config import loads
from vitdense.data.frequency import class_frequencies, repeat_factors
from vitdense.engine import build
from vitdense.engine.run import Run
from vitdense.engine.runtime import Runtime
from vitdense.engine.train import train
from vitdense.losses.pixels import balance

TEXT = """
model: {{backbone: resnet18, head: {{name: linear, class_weights: {weights}}}}}
data:
  dataset: {{name: shapes, task: semantic, images: 24, size: 32}}
  root: {root}
  transforms: {{name: segmentation, size: 32, crop: 32}}
  rare: {rare}
  workers: 0
train: {{steps: 1, batch_size: 4, pictures: 0}}
metric: {{name: miou, boundary: 0.02, calibration: true}}
output: {out}
"""
CPU = Runtime(torch.device("cpu"))


@pytest.mark.parametrize("weights", ["inverse", "median"])
def test_class_weights_follow_from_the_training_split(weights: str, tmp_path: Path) -> None:
    text = TEXT.format(root=tmp_path / "data", out=tmp_path, weights=weights, rare="null")
    run = Run(loads(text, "test"), CPU)
    pixels, shared = class_frequencies(run.data.train)
    assert int(pixels.sum()) == 24 * 32 * 32
    expected = balance(pixels, shared, median=weights == "median")
    assert torch.equal(run.model.head.criterion.class_weights, expected)
    assert expected.argmin() == 0  # most is background


def test_images_of_rare_classes_come_more_often(tmp_path: Path) -> None:
    text = TEXT.format(root=tmp_path / "data", out=tmp_path, weights="null", rare="0.9")
    config = loads(text, "test")
    data = build.build_data(config)
    model = build.build_model(config, data)
    factors = repeat_factors(data.train, 0.9)
    assert factors.max() > 1.2 * factors.min()
    batches = build.training_loader(config, data, model, CPU)
    seen = Counter(index for batch in islice(batches, 24) for index in batch.image_ids)
    shares = factors / factors.sum() * 96
    for index, share in enumerate(shares.tolist()):
        name = data.train[index].image_id
        assert abs(seen[name] - share) <= 4  # once in each of four passes


def test_outlines_and_calibration_are_in_the_results(tmp_path: Path) -> None:
    text = TEXT.format(root=tmp_path / "data", out=tmp_path / "run", weights="null", rare="null")
    results = train(loads(text, "test"))
    assert 0 <= results["mBIoU"] <= 1 and 0 < results["ECE"] < 1


@pytest.mark.parametrize("metric", ["null", "panoptic"])
def test_the_panoptic_metric_knows_the_things_of_the_data(metric: str, tmp_path: Path) -> None:
    text = TEXT.format(root=tmp_path, out=tmp_path, weights="null", rare="null")
    text = text.replace(
        "metric: {name: miou, boundary: 0.02, calibration: true}", f"metric: {metric}"
    )
    built = build.build_metric(loads(text, "test"), "panoptic", ["sky", "cat"], [False, True])
    assert built.things == [False, True]
    without = build.build_metric(loads(text, "test"), "panoptic", ["sky", "cat"])
    assert without.things is None
