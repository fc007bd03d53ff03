"""What parts promise is held against one batch before a run begins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.conv_stages import ConvStages
from examples.resized_pyramid import ResizedPyramid
from examples.wide_linear import WideLinearHead
from vitdense import config
from vitdense.data.shapes import ShapesDataset
from vitdense.data.transforms import NoPolicy
from vitdense.engine.check import check
from vitdense.engine.promises import maps_watched
from vitdense.metrics.miou import MeanIoU
from vitdense.structures import Level, Prediction

CONFIG = """
imports: [examples.conv_stages, examples.resized_pyramid, examples.wide_linear]
model:
  backbone: {name: conv_stages, width: 8, depth: 1}
  neck: {name: resized_pyramid, channels: 8}
  head: {name: wide_linear, width: 8}
data:
  dataset: {name: shapes, task: semantic, images: 4, size: 64}
  root: shapes
  transforms: none
train: {steps: 1, batch_size: 2}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_sound_parts_pass() -> None:
    assert "all is well" in check(config.loads(CONFIG))


def altered(function: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *args, **options: change(function(*args, **options))


def coarser(init: Callable[..., None]) -> Callable[..., None]:
    def build(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self.levels = [Level(it.channels, it.stride * 2) for it in self.levels]

    return build


def label(sample: Any, value: int) -> Any:
    semantic = torch.full_like(sample.target.semantic, value)
    return replace(sample, target=replace(sample.target, semantic=semantic))


def boxed(sample: Any) -> Any:
    boxes = torch.tensor([[20.0, 20.0, 10.0, 10.0]])
    return replace(sample, target=replace(sample.target, labels=torch.tensor([0]), boxes=boxes))


FAULTS: dict[str, tuple[type, str, Callable[[Any], Any], str]] = {
    "maps of another stride": (
        ConvStages,
        "__init__",
        coarser,
        "model.backbone: ConvStages: level 0 declares Level(channels=8, stride=8), so an image of ",
    ),
    "maps of other channels": (
        ResizedPyramid,
        "forward",
        lambda forward: altered(forward, lambda maps: [it[:, :4] for it in maps]),
        "model.neck: ResizedPyramid: level 0 declares Level(channels=8, stride=",
    ),
    "one map": (
        ConvStages,
        "forward",
        lambda forward: altered(forward, lambda maps: maps[-1]),
        "model.backbone: ConvStages.forward must return a list of 4 maps, one per level of "
        "`self.levels`; it returned a Tensor",
    ),
    "a bare loss": (
        WideLinearHead,
        "loss",
        lambda loss: altered(loss, lambda terms: terms["ce"]),
        "model.loss: WideLinearHead.loss must return a dict of named terms, not Tensor",
    ),
    "a map of losses": (
        WideLinearHead,
        "loss",
        lambda loss: altered(loss, lambda terms: {"ce": terms["ce"][None]}),
        "model.loss: term 'ce' of WideLinearHead.loss must be a scalar tensor, a mean or a sum; it",
    ),
    "one answer for all": (
        WideLinearHead,
        "predict",
        lambda predict: altered(predict, lambda answers: answers[0]),
        "model.predict: WideLinearHead.predict must return a list with a Prediction for each of ",
    ),
    "answers of another size": (
        WideLinearHead,
        "predict",
        lambda predict: altered(
            predict, lambda answers: [Prediction(semantic=it.semantic[::2]) for it in answers]
        ),
        "the prediction is of size [32, 64], the truth of [64, 64]",
    ),
    "a pair": (
        ShapesDataset,
        "__getitem__",
        lambda item: altered(item, lambda sample: (sample.image, sample.target)),
        "data.dataset: ShapesDataset must return a Sample with a Target, both of vitdense.struct",
    ),
    "a bare image": (
        NoPolicy,
        "train",
        lambda train: altered(train, lambda sample: sample.image),
        "data.transforms: NoPolicy must return a Sample with a Target, both of vitdense.structur",
    ),
    "channels last": (
        ShapesDataset,
        "__getitem__",
        lambda item: altered(item, lambda it: replace(it, image=it.image.permute(1, 2, 0))),
        "the image is [64, 64, 3]; it must be [C, H, W] with 3 channels",
    ),
    "labels from 1": (
        ShapesDataset,
        "__getitem__",
        lambda item: altered(item, lambda sample: label(sample, 99)),
        "semantic are 99..99, and the ",
    ),
    "width and height": (
        ShapesDataset,
        "__getitem__",
        lambda item: altered(item, boxed),
        "boxes must be x1, y1, x2, y2; in some x2 < x1 or y2 < y1",
    ),
    "a number that is several": (
        MeanIoU,
        "compute",
        lambda compute: altered(compute, lambda numbers: {"mIoU": torch.ones(2)}),
        "metric: MeanIoU.compute must return a dict of numbers by name; it returned {'mIoU'",
    ),
    "no headline": (
        MeanIoU,
        "compute",
        lambda compute: altered(compute, lambda numbers: {"aAcc": 1.0}),
        "metric: MeanIoU computes no 'mIoU', by which the best model is chosen (its headline, or ",
    ),
}


@pytest.mark.parametrize(("cls", "name", "change", "message"), FAULTS.values(), ids=FAULTS)
def test_a_broken_promise_is_told_with_the_part(
    monkeypatch: pytest.MonkeyPatch,
    cls: type,
    name: str,
    change: Callable[[Any], Any],
    message: str,
) -> None:
    monkeypatch.setattr(cls, name, change(getattr(cls, name)))
    with pytest.raises(ValueError) as caught:
        check(config.loads(CONFIG))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda numbers: {name: it for name, it in numbers.items() if name != "IoU/circle"},
        lambda numbers: {name: torch.tensor(it) for name, it in numbers.items()},
    ],
)
def test_numbers_of_which_a_run_makes_no_fault_pass(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]
) -> None:
    """A class that the few images lack, and numbers that are no plain floats."""
    monkeypatch.setattr(MeanIoU, "compute", altered(MeanIoU.compute, change))
    assert "by IoU/circle" in check(config.loads(CONFIG, overrides="train.best=IoU/circle"))


def test_a_backbone_may_be_called_by_keyword() -> None:
    model = config.loads(CONFIG).model(5)
    with maps_watched(model):
        assert len(model.backbone(images=torch.zeros(1, 3, 64, 64))) == len(model.backbone.levels)
