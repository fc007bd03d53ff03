"""What a config asks for rare classes reaches loss and batches; numbers reach the results."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vitdense.config import Part, loads
from vitdense.data.frequency import class_frequencies, images_with_class, repeat_factors
from vitdense.engine import build
from vitdense.engine.run import Run
from vitdense.engine.runtime import Runtime
from vitdense.engine.train import train
from vitdense.losses.pixels import balance
from vitdense.metrics.object_metric import ObjectMetric
from vitdense.structures import Task

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
    factors = repeat_factors(images_with_class(data.train), 0.9)
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


@pytest.mark.parametrize("name", ["coco", "lvis"])
def test_a_metric_that_is_named_compares_what_the_task_answers(name: str) -> None:
    def built(task: Task, **options: Any) -> ObjectMetric:
        config: Any = SimpleNamespace(metric=Part("metric", name, options))
        metric = build.build_metric(config, task, ["a"])
        assert isinstance(metric, ObjectMetric)
        return metric

    assert built("instance", iou_type=None).iou_type == "segm"
    assert built("detection", iou_type=None).iou_type == "bbox"
    assert built("instance", iou_type="bbox").iou_type == "bbox"
    assert built("instance", iou_type="boundary").iou_type == "boundary"


@pytest.mark.parametrize(
    ("name", "options", "task"),
    [
        ("coco", {}, "semantic"),
        ("voc", {}, "panoptic"),
        ("coco", {"iou_type": "segm"}, "detection"),
        ("miou", {}, "instance"),
        ("panoptic", {}, "semantic"),
    ],
)
def test_a_metric_of_another_task_is_refused_before_training(
    name: str, options: dict[str, Any], task: Task
) -> None:
    config: Any = SimpleNamespace(metric=Part("metric", name, options))
    with pytest.raises(ValueError, match=rf"^metric: {name} .* the model's task is {task}; remove"):
        build.build_metric(config, task, ["a"])


def test_processes_share_the_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that counted for all would take longer than the others wait for it."""
    text = TEXT.format(root=tmp_path / "data", out=tmp_path, weights="inverse", rare="0.9")
    config = loads(text, "test")
    train = build.build_data(config).train
    alone, member = (build.build_model(config, build.build_data(config)) for _ in range(2))
    build.weigh_classes(alone, train, CPU)
    repeats = build.image_repeats(config, train, CPU)

    ranks = [replace(CPU, rank=rank, world_size=5) for rank in range(5)]  # 24 images: 5 5 5 5 4
    read, said = [], list[list[Any]]([[], []])
    target = type(train).target
    monkeypatch.setattr(type(train), "target", lambda *a: read.append(a[1]) or target(*a))
    monkeypatch.setattr(Runtime, "gather", lambda _, value: said[0].append(value) or [value])
    for rank in ranks:
        build.weigh_classes(member, train, rank)
    assert sorted(read) == [*range(24)]
    monkeypatch.setattr(Runtime, "gather", lambda *_: said[0])
    build.weigh_classes(member, train, ranks[1])
    for rank in ranks:
        share = range(rank.rank, 24, 5)
        said[1].append(images_with_class(train, images=share))
    monkeypatch.setattr(Runtime, "gather", lambda *_: said[1])
    assert (build.image_repeats(config, train, ranks[1]) == repeats).all()
    weights = [model.head.criterion.class_weights for model in (alone, member)]
    assert torch.equal(*weights)
