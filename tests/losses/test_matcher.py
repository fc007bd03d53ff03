"""The matcher equals scipy image by image, in one copy to the host."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert, generalized_box_iou

from vitdense.losses import matcher as module
from vitdense.losses.classification import FocalLoss, SoftmaxLoss
from vitdense.losses.matcher import HungarianMatcher, Truths, match
from vitdense.structures import Target

CANVAS = (80, 100)


def make_targets(counts, classes: int = 5) -> list[Target]:
    targets = []
    for count in counts:
        start = torch.rand(count, 2) * 50
        boxes = torch.cat((start, start + 3 + torch.rand(count, 2) * 27), 1)
        targets.append(Target(labels=torch.randint(classes, (count,)), boxes=boxes))
    return targets


def make_predictions(layers: int, batch: int, queries: int, classes: int = 5):
    return torch.randn(layers, batch, queries, classes), torch.rand(layers, batch, queries, 4)


def cost_of_one(logits, boxes, target, kind):
    """The cost matrix [Q, N] of one image, as the papers write it."""
    if kind == "softmax":
        classes = -logits.softmax(-1)[:, target.labels]
        weight = 1
    else:
        p = logits.sigmoid()[:, target.labels]
        classes = -0.25 * (1 - p) ** 2 * p.log() + 0.75 * p**2 * (1 - p).log()
        weight = 2
    scale = torch.tensor([100.0, 80, 100, 80])
    truth = target.boxes / scale
    distances = torch.cdist(boxes, box_convert(truth, "xyxy", "cxcywh"), p=1)
    overlaps = generalized_box_iou(box_convert(boxes, "cxcywh", "xyxy"), truth)
    return weight * classes + 5 * distances - 2 * overlaps


def make_matcher(kind: str) -> HungarianMatcher:
    return HungarianMatcher(SoftmaxLoss(), 1, 5, 2) if kind == "softmax" else (
        HungarianMatcher(FocalLoss(), 2, 5, 2)
    )  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["softmax", "focal"]),
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    layers=st.integers(1, 3),
    queries=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_equals_scipy_on_each_image_and_layer(kind, counts, layers, queries, seed):
    torch.manual_seed(seed)
    targets = make_targets(counts)
    logits, boxes = make_predictions(layers, len(counts), queries)
    truths = Truths.from_targets(targets, CANVAS)
    cost = make_matcher(kind).cost(logits, boxes, truths)
    (matches,) = match([cost], truths)
    assert matches.shape == (layers, len(counts), max(counts))
    for layer in range(layers):
        for image, target in enumerate(targets):
            expected = cost_of_one(logits[layer, image], boxes[layer, image], target, kind)
            found = cost[layer, image, : counts[image]].T
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            rows, columns = linear_sum_assignment(found.numpy())
            pairs = set(zip(columns.tolist(), rows.tolist(), strict=True))
            ours = matches[layer, image].tolist()
            assert {(t, q) for t, q in enumerate(ours) if q >= 0} == pairs
            assert all(q == -1 for q in ours[counts[image] :])


def test_matches_sets_of_several_sizes_in_one_copy(monkeypatch):
    torch.manual_seed(0)
    targets = make_targets([2, 0, 3])
    truths = Truths.from_targets(targets, CANVAS)
    matcher = make_matcher("focal")
    costs = [matcher.cost(*make_predictions(3, 3, 7), truths)]
    costs.append(matcher.cost(*make_predictions(1, 3, 40), truths))
    apart = [match([cost], truths)[0] for cost in costs]
    copies = []
    copy = module.copy_to_host
    monkeypatch.setattr(module, "copy_to_host", lambda x: copies.append(x.shape) or copy(x))
    together = match(costs, truths)
    assert copies == [(3 * 3 * 3 * 7 + 3 * 3 * 40,)]
    for a, b in zip(apart, together, strict=True):
        assert torch.equal(a, b)


def test_no_truth_at_all_matches_nothing():
    truths = Truths.from_targets(make_targets([0, 0]), CANVAS)
    cost = make_matcher("focal").cost(*make_predictions(2, 2, 4), truths)
    (matches,) = match([cost], truths)
    assert cost.shape == (2, 2, 0, 4)
    assert matches.shape == (2, 2, 0)


def test_more_objects_than_queries_are_told_once(caplog):
    module._warn_of_few.cache_clear()  # other tests may have been told
    truths = Truths.from_targets(make_targets((3, 7)), CANVAS)
    for queries in (7, 6, 6):
        (found,) = match([torch.rand(2, 2, 7, queries)], truths)
        assert (found[:, 1] >= 0).sum() == 2 * queries
    assert len(caplog.records) == 1
    assert "more objects than the head has queries, 6:" in caplog.text


def test_a_fault_is_matched_so_that_the_loss_shows_it():
    torch.manual_seed(0)
    truths = Truths.from_targets(make_targets([2]), CANVAS)
    logits, boxes = make_predictions(1, 1, 6)
    boxes[0, 0, 4] = torch.nan
    cost = make_matcher("focal").cost(logits, boxes, truths)
    assert cost.isfinite().all()
    assert 4 in match([cost], truths)[0]


@pytest.mark.parametrize("kind", ["softmax", "focal"])
def test_costs_are_finite_for_saturated_logits_and_in_half_precision(kind):
    torch.manual_seed(0)
    truths = Truths.from_targets(make_targets([3, 1]), CANVAS)
    logits, boxes = make_predictions(1, 2, 6)
    cost = make_matcher(kind).cost((logits * 1e4).half(), boxes.half(), truths)
    assert cost.dtype == torch.float32
    assert cost.isfinite().all()
    assert cost.abs().max() < 1e5


def test_truths_name_what_is_missing():
    with pytest.raises(ValueError, match="needs the labels and the boxes"):
        Truths.from_targets([Target(labels=torch.zeros(1, dtype=torch.long))], CANVAS)


def test_cost_grows_with_the_batch_not_with_its_square():
    matcher = make_matcher("focal")
    sizes = []
    for batch in (2, 8):
        truths = Truths.from_targets(make_targets([3] * batch), CANVAS)
        sizes.append(matcher.cost(*make_predictions(2, batch, 5), truths).numel())
    assert sizes[1] == 4 * sizes[0]
