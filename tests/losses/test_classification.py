"""Class losses equal transformers' or the formulas of their papers, with their gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss
from transformers.loss.loss_lw_detr import LwDetrImageLoss
from transformers.loss.loss_rt_detr import RTDetrLoss

from vitdense.losses.classification import (
    CLASS_LOSSES,
    FocalLoss,
    IoUAwareLoss,
    MatchabilityLoss,
    SigmoidLoss,
    VarifocalLoss,
)
from vitdense.ops.boxes import cxcywh_to_xyxy, overlaps

BATCH, QUERIES, CLASSES, TRUTHS = 3, 8, 5, 4
COUNTS = (4, 0, 2)


def make_case(scale: float = 1.0):
    """Logits, boxes, labels, truth boxes and matches of one layer; -1 where there is no truth."""
    torch.manual_seed(0)
    logits = (torch.randn(1, BATCH, QUERIES, CLASSES).double() * scale).requires_grad_()
    boxes = (0.3 + 0.4 * torch.rand(1, BATCH, QUERIES, 4)).double()
    labels = torch.randint(CLASSES, (BATCH, TRUTHS))
    truth = (0.3 + 0.4 * torch.rand(BATCH, TRUTHS, 4)).double()
    matches = torch.full((1, BATCH, TRUTHS), -1)
    for i, count in enumerate(COUNTS):
        matches[0, i, :count] = torch.randperm(QUERIES)[:count]
    return logits, boxes, labels, truth, matches


def ours(loss: SigmoidLoss, logits, boxes, labels, truth, matches) -> torch.Tensor:
    chosen = boxes.gather(2, matches.clamp(min=0)[..., None].expand(-1, -1, -1, 4))
    iou, _ = overlaps(cxcywh_to_xyxy(chosen), cxcywh_to_xyxy(truth))
    return loss.loss(logits, labels, matches, iou, torch.tensor(6.0).double())[0]


def as_transformers(logits, boxes, labels, truth, matches):
    """Outputs, targets and indices as criteria of transformers take them."""
    outputs = {"logits": logits[0], "pred_boxes": boxes[0]}
    targets = [{"class_labels": labels[i, :n], "boxes": truth[i, :n]} for i, n in enumerate(COUNTS)]
    indices = [(matches[0, i, :n], torch.arange(n)) for i, n in enumerate(COUNTS)]
    return outputs, targets, indices


def varifocal(case) -> torch.Tensor:
    config = SimpleNamespace(
        matcher_class_cost=2, matcher_bbox_cost=5, matcher_giou_cost=2, use_focal_loss=True,
        matcher_alpha=0.25, matcher_gamma=2.0, num_labels=CLASSES, weight_loss_vfl=1,
        weight_loss_bbox=5, weight_loss_giou=2, eos_coefficient=1e-4, focal_loss_alpha=0.75,
        focal_loss_gamma=2.0,
    )  # fmt: skip
    return RTDetrLoss(config).loss_labels_vfl(*as_transformers(*case), 6.0)["loss_vfl"]


def iou_aware(case) -> torch.Tensor:
    criterion = LwDetrImageLoss(None, CLASSES, 0.25, ["labels"], 1)
    return criterion.loss_labels(*as_transformers(*case), 6.0)["loss_ce"]


def dense(case, quality):
    """What is expected of each entry [B, Q, C], and which entries belong to a truth."""
    logits, boxes, labels, truth, matches = case
    target = torch.zeros_like(logits[0])
    positive = torch.zeros_like(target, dtype=torch.bool)
    for i, count in enumerate(COUNTS):
        for t in range(count):
            query = matches[0, i, t]
            iou, _ = overlaps(cxcywh_to_xyxy(boxes[0, i, query]), cxcywh_to_xyxy(truth[i, t]))
            target[i, query, labels[i, t]] = quality(iou)
            positive[i, query, labels[i, t]] = True
    return target, positive


def matchability(case, gamma: float = 1.5) -> torch.Tensor:
    """DEIM, equation 4: -q^g log p - (1 - q^g) log(1 - p), and -p^g log(1 - p) elsewhere."""
    p = case[0][0].sigmoid()
    q, positive = dense(case, lambda iou: iou**gamma)
    matched = -q * p.log() - (1 - q) * (1 - p).log()
    others = -(p.detach() ** gamma) * (1 - p).log()  # the code of DEIM detaches this weight
    return torch.where(positive, matched, others).sum() / 6


def focal(case) -> torch.Tensor:
    target, _ = dense(case, torch.ones_like)
    return sigmoid_focal_loss(case[0][0], target, 0.25, 2.0, reduction="sum") / 6


KINDS = {
    "focal": (FocalLoss, focal),
    "varifocal": (VarifocalLoss, varifocal),
    "matchability": (MatchabilityLoss, matchability),
    "iou_aware": (IoUAwareLoss, iou_aware),
}


def test_every_loss_is_tested():
    assert {name: kind for name, (kind, _) in KINDS.items()} == CLASS_LOSSES


@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_equals_its_reference_with_gradients(name, scale):
    kind, reference = KINDS[name]
    case = make_case(scale)
    value, expected = ours(kind(), *case), reference(case)
    # transformers takes IoU in float32
    torch.testing.assert_close(value, expected.double(), atol=1e-6, rtol=1e-6)
    gradients = [torch.autograd.grad(each, case[0])[0] for each in (value, expected)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-6)


def test_iou_aware_is_finite_where_transformers_saturates():
    # transformers takes the logarithm of a rounded probability; ours is that of the logit
    case = make_case(1000.0)
    assert not iou_aware(case).isfinite()
    value = ours(IoUAwareLoss(), *case)
    (gradient,) = torch.autograd.grad(value, case[0])
    assert value.isfinite() and gradient.isfinite().all()


def test_iou_aware_keeps_a_hundredth_for_boxes_without_overlap():
    logits = torch.zeros(1, 1, 1, 1).double().requires_grad_()
    args = (torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, 1, dtype=torch.long))
    value = IoUAwareLoss().loss(logits, *args, torch.zeros(1, 1, 1), torch.tensor(1.0))
    expected = F.binary_cross_entropy_with_logits(torch.zeros(1), torch.tensor([0.01]))
    assert value.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_logits_of_any_size_have_finite_losses_and_gradients(name, dtype):
    _, boxes, labels, truth, matches = make_case()
    logits = torch.linspace(-6e4, 6e4, BATCH * QUERIES * CLASSES)
    logits = logits[torch.randperm(len(logits))].view(1, BATCH, QUERIES, CLASSES)
    logits = logits.to(dtype).float().requires_grad_()  # the criterion raises them to float32
    value = ours(CLASS_LOSSES[name](), logits, boxes.float(), labels, truth.float(), matches)
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("name", list(KINDS))
def test_no_truth_trains_every_entry_towards_zero(name):
    logits, _, labels, _, matches = make_case()
    loss = CLASS_LOSSES[name]()
    one = torch.tensor(1.0)
    for index, classes in (
        (torch.full_like(matches, -1), labels),
        (matches[..., :0], labels[:, :0]),
    ):
        value = loss.loss(logits, classes, index, torch.zeros(index.shape), one)
        torch.testing.assert_close(value[0], loss.negative(logits).sum())
        assert (torch.autograd.grad(value.sum(), logits)[0] > 0).all()


@pytest.mark.parametrize("name", ["varifocal", "matchability", "iou_aware"])
def test_a_better_box_wants_a_higher_score(name):
    # the score at which the loss of a match is least
    scores = torch.linspace(-6, 6, 2001).double()
    best = []
    for iou in (0.2, 0.5, 0.8, 0.99):
        loss = CLASS_LOSSES[name]()
        overlap = torch.full_like(scores, iou)
        best.append(loss.positive(scores, overlap).argmin().item())
    assert best == sorted(best) and len(set(best)) == 4


@pytest.mark.parametrize("name", list(KINDS))
def test_all_match_by_the_focal_cost(name):
    torch.manual_seed(0)
    logits, labels = torch.randn(2, BATCH, QUERIES, CLASSES), torch.randint(CLASSES, (BATCH, 3))
    p = logits.sigmoid()
    expected = -0.25 * (1 - p) ** 2 * p.log() + 0.75 * p**2 * (1 - p).log()
    cost = CLASS_LOSSES[name]().cost(logits, labels)
    for i in range(BATCH):
        torch.testing.assert_close(cost[:, i], expected[:, i][..., labels[i]].transpose(1, 2))
