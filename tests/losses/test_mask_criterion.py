"""The loss of mask classification: equal to transformers', bounded, and blind to void."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerLoss,
    pair_wise_dice_loss,
    pair_wise_sigmoid_cross_entropy_loss,
)

from vitdense.losses import points as at
from vitdense.losses.mask_criterion import MaskCriterion
from vitdense.losses.mask_truths import MaskTruths
from vitdense.structures import IGNORE, Target, Task

SIZE = (48, 64)
CLASSES = 5
TASKS: list[Task] = ["instance", "panoptic", "semantic"]


def make_target(count: int, void: int = 0) -> Target:
    """Segments that fill the image but for `void` columns; one of each class, in any order."""
    layers = torch.randint(count, SIZE) if count else torch.full(SIZE, -1)
    layers[:, SIZE[1] - void :] = -1
    labels = torch.randperm(CLASSES)[:count]
    semantic = torch.full(SIZE, IGNORE)
    for index, label in enumerate(labels.tolist()):
        semantic[layers == index] = label
    masks = layers == torch.arange(count)[:, None, None]
    return Target(labels=labels, masks=masks, semantic=semantic)


def make_predictions(layers: int, batch: int, queries: int = 7) -> tuple[Tensor, list[Tensor]]:
    logits = torch.randn(layers, batch, queries, CLASSES + 1, requires_grad=True)
    coarse = torch.randn(layers, batch, queries, 3, 4) * 3
    masks = [F.interpolate(each, (12, 16), mode="bilinear").requires_grad_() for each in coarse]
    return logits, masks


def fixed_random_points():
    """The same points for every mask, however many are asked for at once."""

    def rand(*size: int, dtype: torch.dtype | None = None, device: object = None) -> Tensor:
        generator = torch.Generator().manual_seed(size[-2])
        points = torch.empty(size[-2], 2).uniform_(generator=generator)
        return points.to(dtype or torch.float32).expand(size).clone()

    return mock.patch("torch.rand", rand)


@pytest.mark.parametrize("task", TASKS)
def test_equals_transformers(task):
    torch.manual_seed(0)
    targets = [make_target(4), make_target(1), make_target(3)]
    logits, masks = make_predictions(3, 3)
    config = Mask2FormerConfig(num_labels=CLASSES, train_num_points=150)
    weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    reference = Mask2FormerLoss(config, weights)
    earlier = [
        {"masks_queries_logits": masks[i], "class_queries_logits": logits[i]} for i in (0, 1)
    ]
    with fixed_random_points():
        truth = [t.masks.float() for t in targets]
        labels = [t.labels for t in targets]
        raw = reference(masks[2], logits[2], truth, labels, earlier)
        ours = MaskCriterion(points=150)(logits, masks, targets, task)
    assert set(ours) == {"class", "mask", "dice", "class_aux", "mask_aux", "dice_aux"}
    for name, theirs in (("class", "loss_cross_entropy"), ("mask", "loss_mask"),
                         ("dice", "loss_dice")):  # fmt: skip
        weight = weights[theirs]
        torch.testing.assert_close(ours[name], weight * raw[theirs])
        both = weight * (raw[f"{theirs}_0"] + raw[f"{theirs}_1"])
        torch.testing.assert_close(ours[f"{name}_aux"], both)
    grads = torch.autograd.grad(sum(ours.values()), masks)
    total = sum(value * weights[key[:-2] if key[-2] == "_" else key] for key, value in raw.items())
    for mine, theirs in zip(grads, torch.autograd.grad(total, masks), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_masks_are_sampled_as_maps():
    torch.manual_seed(0)
    masks, points = torch.rand(4, 9, 13) > 0.5, torch.rand(6, 50, 2)
    rows = torch.tensor([0, 3, 2, 2, 1, 0])
    points[:, 0], points[:, 1] = 0, 1  # the corners
    expected = at.sample_maps(masks[rows, None].float(), points)[:, 0]
    with mock.patch.object(at, "CHUNK", 100):
        found = at.sample_masks(masks, rows, points)
    torch.testing.assert_close(found, expected)


def test_costs_of_pairs_are_losses_of_pairs():
    torch.manual_seed(0)
    logits, truth, weight = torch.randn(2, 5, 40) * 5, torch.rand(2, 3, 40), torch.rand(2, 40)
    for pairwise, pointwise, reference in (
        (at.pairwise_bce, at.point_bce, pair_wise_sigmoid_cross_entropy_loss),
        (at.pairwise_dice, at.point_dice, pair_wise_dice_loss),
    ):
        torch.testing.assert_close(pairwise(logits, truth)[1].T, reference(logits[1], truth[1]))
        for w in (None, weight):
            found = pairwise(logits, truth, w)
            for image, t, q in itertools.product(range(2), range(3), range(5)):
                one = pointwise(logits[image, q], truth[image, t], None if w is None else w[image])
                torch.testing.assert_close(found[image, t, q], one)


def test_a_point_of_weight_0_does_not_count():
    torch.manual_seed(0)
    logits, truth = torch.randn(3, 40), torch.rand(3, 40)
    weight = (torch.arange(40) < 25).float().expand(3, 40)
    for loss in (at.point_bce, at.point_dice):
        expected = loss(logits[:, :25], truth[:, :25])
        torch.testing.assert_close(loss(logits, truth, weight), expected)


def test_the_last_pixel_of_a_large_mask_is_found():
    masks = torch.zeros(1, 8193, 4096, dtype=torch.bool)  # more pixels than float32 can count
    masks[0, -1, -1] = True
    points = torch.tensor([[[4095.5 / 4096, 8192.5 / 8193], [4094.5 / 4096, 8192.5 / 8193]]])
    found = at.sample_masks(masks, torch.tensor([0]), points)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0]]), atol=1e-2, rtol=0)


def test_uncertain_points_lie_where_the_map_changes_sign():
    torch.manual_seed(0)
    maps = torch.linspace(-4, 4, 32).expand(3, 32, 32).contiguous()  # 0 in the middle
    with mock.patch.object(at, "CHUNK", 400):
        points = at.uncertain_points(maps, 100)
    assert points.shape == (3, 100, 2)
    near = (points[..., 0] - 0.5).abs()
    assert near[:, :75].max() < 0.25
    assert near[:, 75:].max() > 0.4


@pytest.mark.parametrize("task", ["panoptic", "semantic"])
def test_void_neither_trains_nor_chooses(task):
    torch.manual_seed(0)
    targets = [make_target(3, void=24)]
    logits, masks = make_predictions(1, 1)
    criterion = MaskCriterion(points=192)
    truths = MaskTruths.from_targets(targets, task)
    changed = masks[0].detach().clone()
    changed[..., 11:] = 50.0  # void starts at cell 10, and the next mixes with it
    changed.requires_grad_()
    with fixed_random_points():
        before, after = (criterion.cost(logits, [m], truths) for m in (masks[0], changed))
        loss = criterion(logits, [changed], targets, task)
    torch.testing.assert_close(before, after)
    (grad,) = torch.autograd.grad(loss["mask"] + loss["dice"], changed)
    assert grad[..., 11:].abs().max() == 0
    assert grad[..., :10].abs().max() > 0


def test_pixels_of_no_object_are_background_for_instances():
    torch.manual_seed(0)
    logits, masks = make_predictions(1, 1)
    loss = MaskCriterion(points=192)(logits, masks, [make_target(3, void=24)], "instance")
    (grad,) = torch.autograd.grad(loss["mask"], masks)
    assert grad[..., 11:].abs().max() > 0


def test_a_mask_does_not_fade_towards_void():
    target = make_target(1, void=24)
    truths = MaskTruths.from_targets([target], "panoptic")
    points = torch.tensor([[[40 / 64, 0.5], [39.75 / 64, 0.5]]])  # on the border, a half beside
    truth, weight = truths.sample(torch.tensor([0]), torch.tensor([0]), points)
    assert weight is not None
    torch.testing.assert_close(truth, torch.ones(1, 2))
    torch.testing.assert_close(weight, torch.tensor([[0.5, 0.75]]))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("counts", [(0, 0), (3, 0), (5, 1)])
def test_empty_and_crowded_images(task, counts):
    """Terms keep their names, and every prediction has a gradient, with too few queries too."""
    torch.manual_seed(0)
    logits, masks = make_predictions(2, 2, queries=4)
    targets = [make_target(count) for count in counts]
    losses = MaskCriterion(points=100)(logits, masks, targets, task)
    assert set(losses) == {"class", "mask", "dice", "class_aux", "mask_aux", "dice_aux"}
    sum(losses.values()).backward()
    for tensor in (logits, *masks):
        assert tensor.grad is not None and tensor.grad.isfinite().all()
    if not sum(counts):
        assert losses["mask"] == losses["dice"] == 0


def test_pairs_are_the_matched_ones():
    truths = MaskTruths.from_targets([make_target(3), make_target(0), make_target(2)], "instance")
    matches = torch.tensor([[[1, -1, 0], [-1] * 3, [1, 0, -1]], [[0, 1, -1], [-1] * 3, [0, 1, -1]]])
    images, queries, rows = truths.pairs(matches, 2)
    assert images.tolist() == [0, 0, 2, 2]
    assert queries.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    assert rows.tolist() == [[0, 2, 3, 4], [0, 1, 3, 4]]


def test_half_precision_is_raised():
    torch.manual_seed(0)
    logits, masks = make_predictions(2, 2)
    targets = [make_target(2), make_target(4)]
    halves = [each.to(torch.bfloat16) for each in masks]
    with fixed_random_points():
        found = MaskCriterion(points=100)(logits.to(torch.bfloat16), halves, targets, "instance")
        exact = MaskCriterion(points=100)(logits, masks, targets, "instance")
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert abs(value - exact[name]) < 0.05 * exact[name]


class Waits(TorchDispatchMode):
    """Notes the operators whose result, or its size, the host must know."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if masked or name in self.NAMES:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("task", "copies"), [("instance", 1), ("panoptic", 1), ("semantic", 2)])
def test_the_host_waits_for_the_matches_and_the_classes_of_a_map(task, copies, monkeypatch):
    torch.manual_seed(0)
    logits, masks = make_predictions(3, 2)
    targets = [make_target(3), make_target(5, void=9)]
    copied, copy = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copied.append(tensor) or copy(tensor))
    with Waits() as waits:
        sum(MaskCriterion(points=100)(logits, masks, targets, task).values()).backward()
    assert len(copied) == copies and not waits.found


@pytest.mark.parametrize("task", TASKS)
def test_missing_truth_is_named(task):
    logits, masks = make_predictions(1, 1)
    with pytest.raises(ValueError, match=f"the task {task} is learnt from .* set `"):
        MaskCriterion()(logits, masks, [Target()], task)


def test_semantic_maps_of_bytes():
    target = make_target(4, void=9)
    small = Target(semantic=target.semantic.to(torch.uint8))
    truths = MaskTruths.from_targets([small], "semantic")
    order = target.labels.argsort()
    assert torch.equal(truths.labels, target.labels[order][None])
    assert torch.equal(truths.masks, target.masks[order])
    assert torch.equal(truths.void, target.semantic[None] == IGNORE)
