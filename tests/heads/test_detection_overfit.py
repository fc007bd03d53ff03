"""Each detection head learns two images by heart: no loss left, and every box found."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.ops import box_iou

from vitdense import HEADS
from vitdense.structures import Frame, Level, Target

SMALL = dict(width=32, heads=4, ffn=64, encoder_layers=1, decoder_layers=2, queries=10, dropout=0.0)

LEFT = {"lwdetr": 0.05, "dino": 0.25, "rtdetr": 0.35}
"""Share of the loss that may be left: soft targets have an entropy, and noise that
is new in every step cannot be learned by heart."""


def make_scene():
    """Two images of coloured rectangles, 64 x 64, and their truth."""
    boxes = [
        [[4.0, 6, 30, 26], [36, 30, 60, 58], [8, 40, 24, 60]],
        [[20.0, 10, 56, 40], [2, 44, 22, 62]],
    ]
    labels = [[0, 1, 2], [2, 0]]
    images = torch.zeros(2, 3, 64, 64)
    for image, corners, classes in zip(images, boxes, labels, strict=True):
        for (left, top, right, bottom), label in zip(corners, classes, strict=True):
            image[label, int(top) : int(bottom), int(left) : int(right)] = 1
    targets = [
        Target(labels=torch.tensor(classes), boxes=torch.tensor(corners))
        for classes, corners in zip(labels, boxes, strict=True)
    ]
    return images, targets


def overfit(head, stride: int, steps: int):
    """Train the head on patches of the scene; returns first and last total loss, and answers."""
    images, targets = make_scene()
    patches = nn.Sequential(nn.Conv2d(3, 32, stride, stride), nn.ReLU())
    halved = nn.Conv2d(32, 32, 2, 2)
    parameters = [*patches.parameters(), *halved.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=0.1
    )
    totals = []
    for _ in range(steps):
        fine = patches(images)
        total = sum(head.loss(head([fine, halved(fine)], targets), targets).values())
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        totals.append(total.detach())
    head.eval()
    with torch.no_grad():
        fine = patches(images)
        answers = head.predict(
            head([fine, halved(fine)]), [Frame((64, 64), (64, 64), (64, 64))] * 2
        )
    return totals[0].item(), totals[-1].item(), answers, targets


@pytest.mark.parametrize(
    "name, stride, steps, options",
    [
        ("detr", 8, 250, dict(level=0)),
        ("detr", 8, 250, dict(level=0, query_kind="conditional")),
        ("detr", 8, 400, dict(level=0, query_kind="dab")),
        ("deformable_detr", 4, 300, dict(num_levels=2, input_levels=[0, 1])),
        ("dino", 8, 400, dict(num_levels=2, queries=30, denoising=10)),
        ("rtdetr", 8, 400, dict(num_levels=2, queries=30, denoising=10, blocks=1, encoder_ffn=64)),
        ("lwdetr", 8, 300, dict(cross_heads=8, groups=4, encoder_layers=None)),
    ],
)
def test_overfits_two_images(name, stride, steps, options):
    torch.manual_seed(0)
    levels = [Level(32, stride), Level(32, 2 * stride)]
    known = {key: value for key, value in (SMALL | options).items() if value is not None}
    head = HEADS.get(name)(levels, 3, **known)
    first, last, answers, targets = overfit(head, stride, steps)
    assert last < LEFT.get(name, 0.01) * first
    for answer, target in zip(answers, targets, strict=True):
        count = len(target.labels)
        overlaps, found = box_iou(target.boxes, answer.boxes[:count]).max(1)
        assert overlaps.min() > 0.9
        assert torch.equal(answer.labels[found], target.labels)
        assert answer.scores[count - 1] > 0.4
        assert answer.scores[count] < 0.3
