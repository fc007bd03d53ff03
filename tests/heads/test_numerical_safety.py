"""Every detection head: hard values stay finite, faults show, and runs repeat."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from vitdense import HEADS
from vitdense.structures import Frame, Level, Target

CLASSES, CANVAS, QUERIES = 4, (64, 96), 8
LEVELS = [Level(8, 8), Level(8, 16)]
SMALL = dict(width=16, heads=2, ffn=16, decoder_layers=2, queries=QUERIES)
TINY = dict(encoder_layers=1, num_levels=2)
KINDS = {
    "detr": dict(encoder_layers=1),
    "deformable_detr": TINY,
    "dino": TINY | dict(denoising=6),
    "rtdetr": TINY | dict(denoising=6, norm="group", blocks=1),
    "lwdetr": dict(groups=2, cross_heads=2),
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def make_head(name: str) -> nn.Module:
    torch.manual_seed(0)
    return HEADS.get(name)(LEVELS, CLASSES, **SMALL, **KINDS[name])


def make_features(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 8, *size, generator=generator) for size in ((8, 12), (4, 6))]


HARD = Target(
    labels=torch.tensor([0, 1, 2, 3, 3, 3, 0]),
    boxes=torch.tensor(
        [
            [10, 10, 10, 30],  # no width
            [20, 20, 20, 20],  # a point
            [0, 0, 96, 64],  # the whole canvas
            [0, 0, 1e-4, 1e-4],  # in the corner, almost nothing
            [95.9, 10, 96, 64],  # at the border
            [95.9, 10, 96, 64],  # and once more
            [-5, -5, 10, 10],  # partly outside
        ]
    ),
)
NONE = Target(labels=torch.zeros(0, dtype=torch.long), boxes=torch.zeros(0, 4))


def terms(head, outputs, targets):
    losses = head.loss(outputs, targets)
    total = sum(losses.values())
    return losses, total


def changed(outputs, change):
    """The outputs with all logits and boxes changed, those of `others` too."""
    logits, boxes = change(outputs.logits, outputs.boxes)
    others = {}
    for name, part in outputs.others.items():
        new = change(part.logits, part.boxes)
        others[name] = replace(part, logits=new[0], boxes=new[1])
    return replace(outputs, logits=logits, boxes=boxes, others=others)


@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_degenerate_truths_have_finite_losses_and_gradients(name, dtype):
    head = make_head(name)
    outputs = head(make_features(), [HARD, NONE])
    lowered = changed(outputs, lambda logits, boxes: (logits.to(dtype), boxes.to(dtype)))
    losses, total = terms(head, lowered, [HARD, NONE])
    total.backward()
    assert all(value.isfinite() and value.dtype == torch.float32 for value in losses.values())
    for key, parameter in head.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_degenerate_and_saturated_predictions_are_finite(name, dtype):
    head = make_head(name)
    outputs = head(make_features(), [HARD, HARD])
    leaves = []

    def extreme(logits, boxes):
        generator = torch.Generator().manual_seed(3)
        signs = torch.randint(3, logits.shape, generator=generator) - 1
        corners = torch.randint(3, boxes.shape, generator=generator) / 2  # 0, a half, 1
        # boxes stay float32: where they have no size, gradients are beyond the range of float16
        pair = (signs * 1e4).to(dtype), corners
        leaves.extend(x.requires_grad_() for x in pair)
        return pair

    losses, total = terms(head, changed(outputs, extreme), [HARD, HARD])
    assert all(value.isfinite() for value in losses.values())
    # the class loss of saturated logits is as large as they are, not capped
    assert losses["class"] > (10 if name == "detr" else 1000)
    total.backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize("part", ["logits", "boxes"])
@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
def test_a_fault_in_one_image_shows_in_the_loss(name, part, fault):
    head = make_head(name)
    outputs = head(make_features(), [HARD, NONE])
    broken = getattr(outputs, part).clone()
    broken[-1, 0, 3] = fault
    outputs = replace(outputs, **{part: broken})
    _, total = terms(head, outputs, [HARD, NONE])
    assert not total.isfinite()


@pytest.mark.parametrize("name", list(KINDS))
def test_a_fault_in_an_earlier_layer_shows_in_the_loss(name):
    head = make_head(name)
    outputs = head(make_features(), [HARD, NONE])
    logits = outputs.logits.clone()
    logits[0, 1, 2, 1] = torch.nan  # in an image without objects
    _, total = terms(head, replace(outputs, logits=logits), [HARD, NONE])
    assert not total.isfinite()


@pytest.mark.parametrize("name", list(KINDS))
def test_a_fault_in_a_feature_shows_in_the_loss(name):
    head = make_head(name)
    features = make_features()
    features[-1][0, 0, 1, 1] = torch.nan
    _, total = terms(head, head(features, [HARD, NONE]), [HARD, NONE])
    assert not total.isfinite()


@pytest.mark.parametrize("name", list(KINDS))
def test_autocast_is_finite(name):
    head = make_head(name)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = head(make_features(), [HARD, NONE])
    losses, total = terms(head, outputs, [HARD, NONE])
    total.backward()
    assert all(value.isfinite() for value in losses.values())
    for key, parameter in head.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", list(KINDS))
def test_equal_scores_are_answered_in_one_order(name):
    head = make_head(name).eval()
    frames = [Frame(CANVAS, CANVAS, CANVAS)] * 2
    for features in ([torch.zeros_like(x) for x in make_features()], make_features()):
        with torch.no_grad():
            answers = [head.predict(head(features), frames) for _ in range(2)]
        for first, second in zip(*answers, strict=True):
            for field in ("scores", "labels", "boxes"):
                assert torch.equal(getattr(first, field), getattr(second, field))
    outputs = head(make_features())
    outputs.logits = torch.zeros_like(outputs.logits)
    centres = torch.arange(outputs.boxes.shape[2]) / 100
    outputs.boxes = outputs.boxes.clone()
    outputs.boxes[..., 0] = 0.3 + centres
    outputs.boxes[..., 1:] = 0.1
    for answer in head.predict(outputs, frames):
        assert answer.scores.unique().numel() == 1
        left = answer.boxes[:, 0]  # rises with the number of the query
        assert left.diff().ge(0).all()


@pytest.mark.parametrize("name", list(KINDS))
def test_the_same_seed_gives_the_same_loss_and_gradients(name):
    runs = []
    for _ in range(2):
        head = make_head(name).train()
        torch.manual_seed(5)
        losses, total = terms(head, head(make_features(), [HARD, NONE]), [HARD, NONE])
        total.backward()
        runs.append((losses, {key: p.grad for key, p in head.named_parameters()}))
    (first, gradients), (second, others) = runs
    assert all(torch.equal(first[key], second[key]) for key in first)
    for key, gradient in gradients.items():
        assert gradient is others[key] or torch.equal(gradient, others[key]), key


@pytest.mark.parametrize("name", list(KINDS))
def test_more_objects_than_queries(name):
    head = make_head(name)
    torch.manual_seed(0)
    start = torch.rand(60, 2) * 40
    many = Target(labels=torch.randint(CLASSES, (60,)), boxes=torch.cat((start, start + 5), 1))
    losses, total = terms(head, head(make_features(), [many, NONE]), [many, NONE])
    total.backward()
    assert all(value.isfinite() for value in losses.values())
