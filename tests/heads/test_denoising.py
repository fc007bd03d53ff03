"""Noisy queries equal transformers' of the same seed, and tell the ordinary ones nothing."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_convert, box_iou
from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import (
    get_contrastive_denoising_training_group,
    inverse_sigmoid,
)

from vitdense import HEADS
from vitdense.heads.detection.denoising import Denoising
from vitdense.losses.matcher import Truths
from vitdense.structures import Level, Target

CANVAS = (64, 96)
CLASSES, WIDTH, ORDINARY = 5, 8, 7


def make_targets(*counts: int) -> list[Target]:
    targets = []
    for count in counts:
        start = torch.rand(count, 2) * torch.tensor([60.0, 40.0])
        boxes = torch.cat((start, start + 4 + torch.rand(count, 2) * 20), 1)
        targets.append(Target(labels=torch.randint(CLASSES, (count,)), boxes=boxes))
    return targets


def both(counts, budget, label_noise=0.5, box_noise=1.0):
    """Noisy queries of ours and what transformers gives, for one seed."""
    torch.manual_seed(0)
    truths = Truths.from_targets(make_targets(*counts), CANVAS)
    denoising = Denoising(CLASSES, WIDTH, budget, label_noise, box_noise)
    torch.manual_seed(1)
    ours = denoising(truths)
    labels = [
        {"class_labels": truths.labels[i, :n], "boxes": truths.boxes[i, :n]}
        for i, n in enumerate(truths.counts)
    ]
    torch.manual_seed(1)
    theirs = get_contrastive_denoising_training_group(
        labels, CLASSES, ORDINARY, denoising.classes, budget, label_noise, box_noise
    )
    return ours, theirs


@pytest.mark.parametrize(
    "counts, budget",
    [((3, 2), 10), ((3, 0, 1), 10), ((4,), 4), ((7, 2), 5), ((1, 1), 100), ((0, 60), 100)],
)
@pytest.mark.parametrize("label_noise, box_noise", [(0.5, 1.0), (1.0, 0.4)])
def test_equals_transformers_with_the_same_seed(counts, budget, label_noise, box_noise):
    ours, theirs = both(counts, budget, label_noise, box_noise)
    contents, places, mask, meta = theirs
    assert ours.groups == meta["dn_num_group"]
    assert [ours.queries.shape[1], ORDINARY] == meta["dn_num_split"]
    assert torch.equal(ours.queries, contents)
    # transformers hands on logits, whose coordinates it keeps off the border
    torch.testing.assert_close(ours.references.clamp(1e-5, 1 - 1e-5), places.sigmoid())
    inside = (ours.references > 0.01) & (ours.references < 0.99)
    torch.testing.assert_close(
        inverse_sigmoid(ours.references)[inside], places[inside], atol=1e-5, rtol=0
    )
    assert torch.equal(ours.mask(ORDINARY), mask == 0)
    size = ours.queries.shape[1] // ours.groups
    for image, count in enumerate(counts):
        assert ours.matches[image, count:].eq(-1).all()
        positives = ours.matches[image, :count] + torch.arange(ours.groups)[:, None] * size
        assert torch.equal(positives.flatten(), meta["dn_positive_idx"][image])


def test_a_batch_without_truth_has_one_group_of_padding():
    # transformers gives none at all; then ranks of a distributed run would disagree on parameters
    ours, theirs = both((0, 0), 100)
    assert theirs == (None, None, None, None)
    assert ours.groups == 1
    assert ours.queries.shape == (2, 2, WIDTH) and ours.queries.eq(0).all()
    assert ours.references.max() <= 1e-5 and ours.matches.shape == (2, 0)
    assert ours.mask(3).tolist() == [[True] * 5] * 2 + [[False] * 2 + [True] * 3] * 3


def test_without_noise_the_positives_are_the_truth():
    torch.manual_seed(0)
    truths = Truths.from_targets(make_targets(3, 1), CANVAS)
    denoising = Denoising(CLASSES, WIDTH, 6, label_noise=0.0, box_noise=0.0)
    noisy = denoising(truths)
    assert noisy.groups == 2
    for start in (0, 3, 6, 9):  # positives and negatives of both groups
        torch.testing.assert_close(noisy.references[:, start : start + 3], truths.boxes)
        expected = denoising.classes(truths.labels[0])
        assert torch.equal(noisy.queries[0, start : start + 3], expected)
        assert noisy.queries[1, start + 1 : start + 3].eq(0).all()


def test_negatives_fit_worse_than_any_positive_may():
    torch.manual_seed(0)
    truths = Truths.from_targets(make_targets(5), (200, 200))  # all corners far from the border
    truths.boxes[..., :2] += 0.3
    noisy = Denoising(CLASSES, WIDTH, 500, 0.5, 1.0)(truths)
    corners = box_convert(noisy.references[0], "cxcywh", "xyxy").view(100, 2, 5, 4)
    truth = box_convert(truths.boxes[0], "cxcywh", "xyxy")
    half = truths.boxes[0, :, 2:].repeat(1, 2) / 2
    moves = (corners - truth).abs() / half
    assert moves[:, 0].max() <= 1.001
    crossed = (noisy.references[0, :, 2:] < 1e-4).any(-1).view(100, 2, 5)  # left beyond right
    negatives = moves[:, 1][~crossed[:, 1]]
    assert negatives.min() >= 0.999 and negatives.max() <= 2.001
    for i in range(5):
        positive, negative = (box_iou(truth[i][None], corners[:, kind, i]) for kind in (0, 1))
        assert positive.mean() > 2 * negative.mean()


def test_as_many_labels_change_as_the_noise_says():
    torch.manual_seed(0)
    denoising = Denoising(CLASSES, WIDTH, 100, 0.5, 1.0)
    labels = torch.randint(CLASSES, (8, 5000))
    changed = denoising._relabel(labels, torch.ones_like(labels, dtype=torch.bool)) != labels
    # a quarter is drawn anew, of which a fifth draws the same class again
    assert abs(changed.float().mean() - 0.25 * 0.8) < 0.01


SMALL = dict(
    width=16, heads=2, ffn=16, encoder_layers=1, decoder_layers=2, queries=6, num_levels=2,
)  # fmt: skip


@pytest.fixture(params=["dino", "rtdetr"])
def head(request):
    torch.manual_seed(0)
    # the statistics of batch norms would move between two runs of the same head
    extra = dict(norm="group", blocks=1) if request.param == "rtdetr" else {}
    levels = [Level(6, 8), Level(8, 16)]
    return HEADS.get(request.param)(levels, CLASSES, denoising=9, **SMALL, **extra).double()


@pytest.fixture
def features():
    torch.manual_seed(0)
    return [torch.randn(3, 6, 8, 12).double(), torch.randn(3, 8, 4, 6).double()]


def test_ordinary_queries_never_see_the_truth(head, features):
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.3)
    alone = head(features)
    assert "_denoising" not in alone.others
    for counts in ((3, 0, 2), (0, 0, 0), (20, 1, 1)):
        outputs = head(features, make_targets(*counts))
        torch.testing.assert_close(outputs.logits, alone.logits, atol=1e-10, rtol=0)
        torch.testing.assert_close(outputs.boxes, alone.boxes, atol=1e-10, rtol=0)
        noisy = outputs.others["_denoising"]
        most = max(1, *counts)
        groups = max(1, 9 // most) if sum(counts) else 1
        assert noisy.logits.shape == (2, 3, 2 * most * groups, CLASSES)


def test_groups_do_not_see_each_other(head, features):
    targets = make_targets(3, 0, 2)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.3)
    make = type(head.denoising).forward
    outputs = []
    for shift in (0.0, 1.0):

        def shifted(truths, shift=shift):
            torch.manual_seed(2)
            noisy = make(head.denoising, truths)
            changed = noisy.queries.clone()
            changed[:, 6:12] += shift  # the second of three groups
            return noisy._replace(queries=changed)

        head.denoising.forward = shifted
        outputs.append(head(features, targets).others["_denoising"])
    assert outputs[0].groups == 3
    before, after = (each.logits.unflatten(2, (3, 6)) for each in outputs)
    torch.testing.assert_close(before[:, :, [0, 2]], after[:, :, [0, 2]], atol=1e-10, rtol=0)
    assert (before[:, :, 1] - after[:, :, 1]).abs().max() > 0.01


def test_noise_is_for_training_only(head, features):
    head.eval()
    assert "_denoising" not in head(features, make_targets(3, 0, 2)).others


def test_the_same_seed_gives_the_same_loss(head, features):
    targets = make_targets(3, 0, 2)
    losses = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        losses.append(head.loss(head(features, targets), targets))
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])
    assert losses[0]["box_denoising"] != losses[2]["box_denoising"]
    assert torch.equal(losses[0]["box"], losses[2]["box"])
