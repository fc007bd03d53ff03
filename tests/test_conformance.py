"""The conformance kit passes on sound parts and says what is wrong with broken ones."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from examples.conv_stages import ConvStages
from examples.resized_pyramid import ResizedPyramid
from examples.wide_linear import WideLinearHead
from vitdense.data.base import Dataset, Policy
from vitdense.heads.base import Head
from vitdense.metrics.base import Metric
from vitdense.models.pyramid import PyramidModel
from vitdense.structures import IGNORE, Level, Prediction, Sample, Target
from vitdense.testing import (
    check_backbone,
    check_dataset,
    check_head,
    check_metric,
    check_model,
    check_neck,
    check_policy,
)


def fails(message: str):
    return pytest.raises(AssertionError, match=message)


# ------------------------------------------------------------------------------------- heads


class SmallHead(WideLinearHead):
    """The example, made quick."""

    def __init__(self, levels, num_classes):
        super().__init__(levels, num_classes, width=8)


class GridDetector(Head):
    """One box per cell of the coarsest level: the smallest detector that is sound."""

    task = "detection"

    def __init__(self, levels, num_classes):
        super().__init__(levels, num_classes)
        self.classify = nn.Conv2d(levels[-1].channels, num_classes, 1)
        self.regress = nn.Conv2d(levels[-1].channels, 4, 1)

    def forward(self, features, targets=None):
        logits = self.classify(features[-1]).flatten(2).mT
        return {"logits": logits, "boxes": self.regress(features[-1]).flatten(2).mT.sigmoid()}

    def loss(self, outputs, targets):
        objects = max(1, sum(len(target.labels) for target in targets))
        cls = outputs["logits"].float().sigmoid().sum() / objects
        boxes = [o[:1] * len(t.labels) for o, t in zip(outputs["boxes"], targets, strict=True)]
        return {"class": cls, "box": torch.stack([b.sum() for b in boxes]).float().sum() / objects}

    def predict(self, outputs, frames):
        return [
            self.decode(logits.float(), boxes.float(), frame)
            for logits, boxes, frame in zip(
                outputs["logits"], outputs["boxes"], frames, strict=True
            )
        ]

    def decode(self, logits, boxes, frame):
        scores, labels = logits.sigmoid().max(-1)
        order = scores.argsort(descending=True)
        canvas = boxes.new_tensor([*frame.canvas[::-1]] * 2)
        corners = torch.cat([boxes[:, :2], (boxes[:, :2] + boxes[:, 2:]).clamp(max=1)], 1)
        restored = frame.restore_boxes(corners[order] * canvas)
        return Prediction(scores=scores[order], labels=labels[order], boxes=restored)


class DecodesInEvaluation(SmallHead):
    def forward(self, features, targets=None):
        logits = super().forward(features)
        return logits if self.training else (logits, logits.argmax(1))

    def predict(self, outputs, frames):
        return super().predict(outputs[0], frames)


class MapLoss(SmallHead):
    def loss(self, outputs, targets):
        return {"ce": super().loss(outputs, targets)["ce"] * torch.ones(2)}


class MeanOverNothing(SmallHead):
    def loss(self, outputs, targets):
        truth = torch.stack([target.semantic for target in targets]).long()
        logits = nn.functional.interpolate(outputs.float(), truth.shape[-2:])
        return {"ce": nn.functional.cross_entropy(logits, truth, ignore_index=IGNORE)}


class TermsComeAndGo(SmallHead):
    def loss(self, outputs, targets):
        losses = super().loss(outputs, targets)
        if all(len(target.labels) for target in targets):
            losses["objects"] = outputs.float().mean() * 0.1
        return losses


class ConstantTerm(SmallHead):
    def loss(self, outputs, targets):
        return super().loss(outputs, targets) | {"extra": torch.tensor(0.0)}


class UnusedParameter(SmallHead):
    def __init__(self, levels, num_classes):
        super().__init__(levels, num_classes)
        self.spare = nn.Linear(2, 2)


class InfiniteGradient(SmallHead):
    def loss(self, outputs, targets):
        return {"ce": super().loss(outputs, targets)["ce"] + (outputs.float() * 0).norm().sqrt()}


class CanvasSized(SmallHead):
    def predict(self, outputs, frames):
        return [Prediction(semantic=logits.argmax(0)) for logits in outputs]


class RandomInEvaluation(SmallHead):
    def forward(self, features, targets=None):
        return nn.functional.dropout(super().forward(features, targets), 0.5)


class BatchStatistics(SmallHead):
    def forward(self, features, targets=None):
        logits = super().forward(features, targets)
        return logits - logits.mean((0, 2, 3), keepdim=True)


class HiddenState(SmallHead):
    def __init__(self, levels, num_classes):
        super().__init__(levels, num_classes)
        self.offset = torch.randn(num_classes, 1, 1) * 5

    def forward(self, features, targets=None):
        return super().forward(features, targets) + self.offset


class NeedsTwoImages(SmallHead):
    def __init__(self, levels, num_classes):
        super().__init__(levels, num_classes)
        self.norm = nn.BatchNorm1d(levels[-1].channels)
        self.gate = nn.Linear(levels[-1].channels, 1)

    def forward(self, features, targets=None):
        gate = self.gate(self.norm(features[-1].mean((2, 3))))
        return super().forward(features, targets) + gate[..., None, None]


class Logits(GridDetector):
    def decode(self, logits, boxes, frame):
        answer = super().decode(logits, boxes, frame)
        return replace(answer, scores=answer.scores * 3)


class Unsorted(GridDetector):
    def decode(self, logits, boxes, frame):
        answer = super().decode(logits, boxes, frame)
        return replace(answer, scores=answer.scores.flip(0))


class CentreBoxes(GridDetector):
    def decode(self, logits, boxes, frame):
        answer = super().decode(logits, boxes, frame)
        low, high = answer.boxes.split(2, 1)
        return replace(answer, boxes=torch.cat([(low + high) / 2, (high - low) / 9], 1))


class OutsideBoxes(GridDetector):
    def decode(self, logits, boxes, frame):
        answer = super().decode(logits, boxes, frame)
        return replace(answer, boxes=answer.boxes + 9)


class ShortLabels(GridDetector):
    def decode(self, logits, boxes, frame):
        answer = super().decode(logits, boxes, frame)
        return replace(answer, labels=answer.labels.int())


class LabelsFromOne(GridDetector):
    def decode(self, logits, boxes, frame):
        answer = super().decode(logits, boxes, frame)
        return replace(answer, labels=torch.full_like(answer.labels, self.num_classes))


class WithoutBoxes(GridDetector):
    def decode(self, logits, boxes, frame):
        return replace(super().decode(logits, boxes, frame), boxes=None)


class SmallMasks(GridDetector):
    def decode(self, logits, boxes, frame):
        answer = super().decode(logits, boxes, frame)
        masks = torch.zeros(len(answer.labels), *frame.canvas, dtype=torch.bool)
        return replace(answer, masks=masks)


class PlainTensor(SmallHead):
    def __init__(self, levels, num_classes):
        super().__init__(levels, num_classes)
        self.fuse.scales = [torch.ones(1)]


class WithoutLoss(Head):
    task = "semantic"

    def forward(self, features, targets=None): ...
    def predict(self, outputs, frames): ...


class NoPrediction(SmallHead):
    def predict(self, outputs, frames):
        return [answer.semantic for answer in super().predict(outputs, frames)]


@pytest.mark.parametrize("head", [SmallHead, GridDetector])
def test_sound_head(head):
    check_head(head)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (DecodesInEvaluation, "same type in training and in evaluation"),
        (MapLoss, "'ce' must be a scalar"),
        (MeanOverNothing, "'ce' is nan for targets without objects"),
        (TermsComeAndGo, "Return every term always"),
        (ConstantTerm, "'extra' is cut from the graph"),
        (UnusedParameter, "no gradient reaches 'spare.weight', 'spare.bias'"),
        (InfiniteGradient, "gradient of .* is not finite"),
        (CanvasSized, "semantic must be int64 of the original's size"),
        (RandomInEvaluation, "Random numbers"),
        (BatchStatistics, "same image in a batch"),
        (HiddenState, "use register_buffer"),
        (Logits, "scores must lie in 0..1"),
        (Unsorted, "scores must descend"),
        (CentreBoxes, "another format"),
        (OutsideBoxes, "leave the original image"),
        (ShortLabels, "labels must be int64"),
        (LabelsFromOne, r"labels must lie in 0\.\.2"),
        (WithoutBoxes, r"must hold \['boxes'\]"),
        (SmallMasks, "masks must be bool"),
        (PlainTensor, "`fuse.scales` holds a tensor that stays on the CPU"),
        (WithoutLoss, "has no method loss; every head has forward, loss, predict"),
        (NoPrediction, "give a Prediction for each image, not a Tensor"),
    ],
)
def test_broken_head(head, message):
    with fails(message) as caught:
        check_head(head)
    assert str(caught.value).startswith(head.__name__)


def test_errors_inside_a_part_say_the_situation():
    with pytest.raises(ValueError, match="more than 1 value per channel") as caught:
        check_head(NeedsTwoImages)
    assert caught.value.__notes__ == ["NeedsTwoImages: forward and loss for a batch of one image"]


def test_checks_leave_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    check_head(SmallHead)
    assert torch.equal(torch.rand(2), expected)


# --------------------------------------------------------------------------- backbones, necks


class SmallBackbone(ConvStages):
    def __init__(self, in_chans=3):
        super().__init__(width=4, depth=1, in_chans=in_chans)


class FlooredSizes(SmallBackbone):
    def forward(self, images):
        height, width = images.shape[-2:]
        return super().forward(images[..., : height // 32 * 32, : width // 32 * 32])


class WrongChannels(SmallBackbone):
    def __init__(self):
        super().__init__()
        self.levels = [Level(level.channels + 1, level.stride) for level in self.levels]


class ThreeMeans(SmallBackbone):
    def __init__(self):
        super().__init__(in_chans=4)
        self.mean = (0.5, 0.5, 0.5)


class StrangeDepths(SmallBackbone):
    def layer_depths(self):
        return super().layer_depths() | {"head.weight": 5}


class SharedBackbone(SmallBackbone):
    def forward(self, images):
        return [map_ - map_.mean(0, keepdim=True) for map_ in super().forward(images)]


class SmallNeck(ResizedPyramid):
    def __init__(self, levels):
        super().__init__(levels, channels=8)


class CoarsestFirst(SmallNeck):
    def __init__(self, levels):
        super().__init__(levels)
        self.levels = self.levels[::-1]


class ForgetsLevel(SmallNeck):
    def forward(self, features):
        return super().forward(features)[:-1]


class Overwrites(SmallNeck):
    def forward(self, features):
        features[-1].mul_(2)
        return super().forward(features)


class Overflows(SmallNeck):
    def forward(self, features):
        return [map_ / 0 for map_ in super().forward(features)]


@pytest.mark.parametrize("in_chans", [1, 3, 5])
def test_sound_backbone(in_chans):
    check_backbone(SmallBackbone, in_chans=in_chans)


def test_frozen_backbone_is_sound():
    def frozen():
        return SmallBackbone().requires_grad_(False)

    check_backbone(frozen)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (FlooredSizes, r"ceil\(size / stride\)"),
        (WrongChannels, r"declares Level\(channels=5"),
        (ThreeMeans, "has 3 values in `mean`; give one for each of in_chans=4"),
        (StrangeDepths, "which are no parameters"),
        (SharedBackbone, "same image in a batch"),
    ],
)
def test_broken_backbone(backbone, message):
    with fails(message):
        check_backbone(backbone)


@pytest.mark.parametrize(("stride", "size"), [(16, (64, 96)), (14, (56, 84))])
def test_sound_neck(stride, size):
    check_neck(SmallNeck, levels=[Level(12, stride)] * 4, size=size)


@pytest.mark.parametrize(
    ("neck", "message"),
    [
        (CoarsestFirst, "from the finest map to the coarsest"),
        (ForgetsLevel, "a list of 4 maps"),
        (Overwrites, "changes the features"),
        (Overflows, "not finite"),
    ],
)
def test_broken_neck(neck, message):
    with fails(message):
        check_neck(neck, levels=[Level(12, 16)] * 4)


# ------------------------------------------------------------------------------------ models


def test_sound_model():
    check_model(PyramidModel, backbone=SmallBackbone, head=SmallHead)
    check_model(PyramidModel, backbone=SmallBackbone, head=SmallHead, neck=SmallNeck)


def test_broken_model():
    with fails("same type in training and in evaluation"):
        check_model(PyramidModel, backbone=SmallBackbone, head=DecodesInEvaluation)
    with fails("no gradient reaches 'neck.smooth.0.weight'"):  # made, but read by nobody
        check_model(PyramidModel, backbone=SmallBackbone, head=GridDetector, neck=SmallNeck)


# --------------------------------------------------------------------------------- data sets


class Memory(Dataset):
    """Two images with boxes, made up on the spot; `root` is an existing file."""

    classes = ["a", "b"]
    category_ids = [3, 7]

    def __len__(self):
        return 2

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(256, (self.channels, 20, 30), generator=generator, dtype=torch.uint8)
        target = Target(labels=torch.tensor([0, 1]), boxes=torch.tensor([[0.0, 0, 9, 9]] * 2))
        return self.change(Sample(image, target, index, (20, 30), self.root))

    def change(self, sample):
        return sample


class SwappedSize(Memory):
    def change(self, sample):
        return replace(sample, original=(30, 20))


class RawIds(Memory):
    def change(self, sample):
        return replace(sample, target=replace(sample.target, labels=torch.tensor([3, 7])))


class WidthHeight(Memory):
    def change(self, sample):
        return replace(
            sample, target=replace(sample.target, boxes=torch.tensor([[9.0, 9, 5, 5]] * 2))
        )


class FloatImage(Memory):
    def change(self, sample):
        return replace(sample, image=sample.image / 255)


class OneId(Memory):
    def change(self, sample):
        return replace(sample, image_id="x")


class Augments(Memory):
    def change(self, sample):
        return replace(sample, image=torch.randint_like(sample.image, 256))


class AlwaysColour(Memory):
    def change(self, sample):
        return replace(sample, image=sample.image[:1].expand(3, -1, -1))


class BareLabels(Memory):
    def change(self, sample):
        semantic = torch.full((20, 30), 254, dtype=torch.uint8)
        return replace(sample, target=Target(semantic=semantic))


class MissingId(Memory):
    category_ids = [3]


class TwiceNamed(Memory):
    classes = ["a", "a"]


class RawLabels(Memory):
    def labels(self, index):
        return torch.tensor([1, 0])


class OpenFile(Memory):
    def __init__(self, root, split):
        super().__init__(root, split)
        self.decode = lambda image: image


class Pair(Memory):
    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return sample.image, sample.target


def test_sound_dataset():
    check_dataset(Memory, __file__, "train")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (SwappedSize, r"original is \(30, 20\)"),
        (RawIds, r"labels must lie in 0\.\.1"),
        (WidthHeight, "xyxy pixels inside"),
        (FloatImage, "image must be uint8"),
        (OneId, "unique ids"),
        (Augments, "differs when read again"),
        (AlwaysColour, "decode to self.channels"),
        (BareLabels, r"semantic must lie in 0\.\.1"),
        (MissingId, "1 ids for 2 classes"),
        (TwiceNamed, "names a class twice"),
        (RawLabels, r"labels\(0\) is \[1, 0\], and the truth shows \[0, 1\]"),
        (OpenFile, "cannot be pickled"),
        (
            Pair,
            r"Pair\[0\] must return a Sample with a Target, both of vitdense.structures; it ret",
        ),
    ],
)
def test_broken_dataset(dataset, message):
    with fails(message):
        check_dataset(dataset, __file__, "train")


# ---------------------------------------------------------------------------------- policies


class Flip(Policy):
    """Mirrors image and truth half of the time."""

    def train(self, sample):
        if torch.rand(()) < 0.5:
            return sample
        width, target = sample.image.shape[2], sample.target
        x1, y1, x2, y2 = target.boxes.unbind(1)
        flipped = replace(
            target,
            boxes=torch.stack([width - x2, y1, width - x1, y2], 1),
            masks=target.masks.flip(2),
            semantic=target.semantic.flip(1),
        )
        return replace(sample, image=sample.image.flip(2), target=flipped)

    def evaluate(self, sample):
        return sample


class ForgetsMasks(Flip):
    def train(self, sample):
        return replace(sample, image=sample.image[:, :40, :40])


class PythonRandom(Flip):
    def train(self, sample):
        return replace(sample, image=sample.image.roll(random.randrange(1, 2**30), 2))


class InPlace(Flip):
    def train(self, sample):
        sample.image.clamp_(max=9)
        return sample


class ResizesTruth(Flip):
    def evaluate(self, sample):
        return replace(sample, target=replace(sample.target, boxes=sample.target.boxes / 2))


class Normalises(Flip):
    def evaluate(self, sample):
        return replace(sample, image=sample.image / 255)


@dataclass
class LargerThanPromised(Flip):
    canvas: tuple[int, int] = (32, 32)


def test_sound_policy():
    check_policy(Flip)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (ForgetsMasks, "target.boxes must be|target.masks must be"),
        (PythonRandom, "Draw from torch"),
        (InPlace, "changes the sample"),
        (ResizesTruth, "leave the truth in original pixels"),
        (Normalises, "the model normalises"),
        (LargerThanPromised, "promised canvas"),
    ],
)
def test_broken_policy(policy, message):
    with fails(message):
        check_policy(policy)


# ----------------------------------------------------------------------------------- metrics


class PixelAccuracy(Metric):
    headline = "accuracy"

    def __init__(self, classes):
        super().__init__(classes)
        self.reset()

    def reset(self):
        self.right = self.total = 0

    def update(self, predictions, batch):
        for prediction, target in zip(predictions, batch.targets, strict=True):
            counted = target.semantic != IGNORE
            self.right += int((prediction.semantic == target.semantic)[counted].sum())
            self.total += int(counted.sum())

    def compute(self):
        return {"accuracy": self.right / max(1, self.total), "absent": float("nan")}


class ErrorRate(PixelAccuracy):
    def compute(self):
        return {"accuracy": 1 - super().compute()["accuracy"]}


class Unnamed(PixelAccuracy):
    headline = "mAP"


class LastBatchOnly(PixelAccuracy):
    def update(self, predictions, batch):
        self.reset()
        self.right = 1 / len(predictions)
        super().update(predictions, batch)


class NeverForgets(PixelAccuracy):
    def __init__(self, classes):
        super().__init__(classes)
        self.right = self.total = 0

    def reset(self):
        if not hasattr(self, "total"):
            self.right = self.total = 0

    def compute(self):
        return {"accuracy": float(self.right)}


class Tensors(PixelAccuracy):
    def compute(self):
        return {"accuracy": torch.tensor(1.0)}


def test_sound_metric():
    check_metric(PixelAccuracy)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (ErrorRate, "higher must be better"),
        (Unnamed, "headline is 'mAP'"),
        (LastBatchOnly, "gives other numbers"),
        (NeverForgets, "reset"),
        (Tensors, "plain numbers"),
    ],
)
def test_broken_metric(metric, message):
    with fails(message):
        check_metric(metric)


@pytest.mark.parametrize(
    "check", [check_backbone, check_neck, check_head, check_model, check_policy, check_metric]
)
def test_a_part_of_another_kind_is_named(check):
    class Stranger(nn.Module):
        def __init__(self, *facts):
            super().__init__()

    with fails(r"Stranger at .*test_conformance.py:\d+ must derive from vitdense"):
        check(Stranger)
    with fails(r"Stranger at .*test_conformance.py:\d+ must derive from vitdense"):
        check_dataset(Stranger, Path(__file__), "train")
