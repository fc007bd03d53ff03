"""Set losses: equal to a loop over images, unmoved by order, padding and batching."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

from vitdense.losses.classification import FocalLoss, SoftmaxLoss
from vitdense.losses.matcher import Truths, match
from vitdense.losses.set_criterion import Queries, SetCriterion, count_truths
from vitdense.structures import Target

CANVAS = (80, 100)
CLASSES = 5


def make_targets(*counts: int) -> list[Target]:
    targets = []
    for count in counts:
        start = torch.rand(count, 2) * 50
        boxes = torch.cat((start, start + 3 + torch.rand(count, 2) * 27), 1)
        targets.append(Target(labels=torch.randint(CLASSES, (count,)), boxes=boxes))
    return targets


def make_queries(layers: int, batch: int, queries: int, classes: int = CLASSES) -> Queries:
    logits = torch.randn(layers, batch, queries, classes).double().requires_grad_()
    boxes = (0.2 + 0.6 * torch.rand(layers, batch, queries, 4)).double().requires_grad_()
    return Queries(logits, boxes)


def make_criterion(kind: str = "focal") -> SetCriterion:
    if kind == "softmax":
        return SetCriterion(SoftmaxLoss(), class_cost=1, class_weight=1)
    return SetCriterion(FocalLoss(), class_cost=2, class_weight=2)


def loss_by_loop(kind, logits, boxes, targets, matches):
    """Terms of one layer, image by image, with torchvision's losses."""
    count = max(1, sum(len(t.labels) for t in targets))
    dense, classes, box, giou = [], [], 0, 0
    for i, target in enumerate(targets):
        n = len(target.labels)
        found = matches[i, :n]
        truth = target.boxes.double() / torch.tensor([100, 80, 100, 80])
        box += (boxes[i, found] - box_convert(truth, "xyxy", "cxcywh")).abs().sum()
        corners = box_convert(boxes[i, found], "cxcywh", "xyxy")
        giou += generalized_box_iou_loss(corners, truth, eps=0, reduction="sum")
        each = torch.full((logits.shape[1],), CLASSES)
        each[found] = target.labels
        classes.append(each)
        dense.append(F.one_hot(each, CLASSES + 1)[:, :CLASSES].double())
    if kind == "softmax":
        weight = torch.ones(CLASSES + 1).double()
        weight[-1] = 0.1
        class_term = F.cross_entropy(logits.flatten(0, 1), torch.cat(classes), weight)
    else:
        class_term = 2 * sigmoid_focal_loss(logits, torch.stack(dense), reduction="sum") / count
    return {"class": class_term, "box": 5 * box / count, "giou": 2 * giou / count}


@pytest.mark.parametrize("kind", ["softmax", "focal"])
@pytest.mark.parametrize("counts", [(3, 0, 2), (1, 1, 4)])
def test_equals_a_loop_over_images_and_layers(kind, counts):
    torch.manual_seed(0)
    queries = make_queries(3, 3, 7, CLASSES + (kind == "softmax"))
    targets = make_targets(*counts)
    criterion = make_criterion(kind)
    losses = criterion({"": queries}, targets, CANVAS)
    truths = Truths.from_targets(targets, CANVAS)
    (matches,) = match([criterion.matcher.cost(queries.logits, queries.boxes, truths)], truths)
    expected = [
        loss_by_loop(kind, queries.logits[i], queries.boxes[i], targets, matches[i])
        for i in range(3)
    ]
    for name in ("class", "box", "giou"):
        torch.testing.assert_close(losses[name], expected[2][name])
        torch.testing.assert_close(losses[name + "_aux"], expected[0][name] + expected[1][name])


@pytest.mark.parametrize("kind", ["softmax", "focal"])
def test_gradients_are_right(kind):
    torch.manual_seed(0)
    queries = make_queries(2, 2, 4, CLASSES + (kind == "softmax"))
    targets = make_targets(2, 1)
    criterion = make_criterion(kind)

    def total(logits, boxes):
        return sum(criterion({"": Queries(logits, boxes)}, targets, CANVAS).values())

    assert torch.autograd.gradcheck(total, (queries.logits, queries.boxes))


@pytest.mark.parametrize("kind", ["softmax", "focal"])
def test_no_truth_trains_the_classes_and_gives_connected_zeros(kind):
    torch.manual_seed(0)
    queries = make_queries(2, 2, 4, CLASSES + (kind == "softmax"))
    losses = make_criterion(kind)({"": queries}, make_targets(0, 0), CANVAS)
    assert losses["class"] > 0
    for name in ("box", "giou", "box_aux", "giou_aux"):
        assert losses[name] == 0
        assert losses[name].requires_grad
    sum(losses.values()).backward()
    assert queries.boxes.grad.eq(0).all()
    assert queries.logits.grad.abs().sum() > 0


def test_terms_have_the_same_names_on_every_step():
    queries = {"": make_queries(2, 2, 6), "_encoder": make_queries(1, 2, 20)}
    criterion = make_criterion()
    names = [list(criterion(queries, make_targets(*c), CANVAS)) for c in ((0, 0), (3, 1), (9, 9))]
    assert names[0] == names[1] == names[2]
    assert names[0] == [
        "class", "class_aux", "box", "box_aux", "giou", "giou_aux",
        "class_encoder", "box_encoder", "giou_encoder",
    ]  # fmt: skip


def test_order_of_truths_does_not_matter():
    torch.manual_seed(0)
    queries, targets = make_queries(2, 2, 8), make_targets(5, 3)
    before = make_criterion()({"": queries}, targets, CANVAS)
    order = torch.randperm(5)
    targets[0] = Target(labels=targets[0].labels[order], boxes=targets[0].boxes[order])
    after = make_criterion()({"": queries}, targets, CANVAS)
    torch.testing.assert_close(before, after)


def test_batch_equals_single_images():
    torch.manual_seed(0)
    queries, targets = make_queries(2, 3, 8), make_targets(5, 0, 2)
    together = make_criterion()({"": queries}, targets, CANVAS)
    total = {name: torch.zeros(()).double() for name in together}
    for i, target in enumerate(targets):
        alone = Queries(queries.logits[:, i : i + 1], queries.boxes[:, i : i + 1])
        for name, value in make_criterion()({"": alone}, [target], CANVAS).items():
            total[name] += value * max(1, len(target.labels)) / 7
    torch.testing.assert_close(together, total)


def test_padding_of_truths_has_no_effect():
    torch.manual_seed(0)
    queries, targets = make_queries(2, 2, 8), make_targets(2, 3)
    crowded = [*targets, *make_targets(8)]
    more = make_queries(2, 3, 8)
    logits = torch.cat((queries.logits, more.logits[:, 2:]), 1)
    boxes = torch.cat((queries.boxes, more.boxes[:, 2:]), 1)
    criterion = make_criterion()
    one = torch.ones(())
    terms = []
    for some, x, b in ((targets, queries.logits, queries.boxes), (crowded, logits, boxes)):
        truths = Truths.from_targets(some, CANVAS)
        (matches,) = match([criterion.matcher.cost(x, b, truths)], truths)
        cut = Truths(truths.labels[:2], truths.boxes[:2], truths.counts[:2])
        queries = Queries(x[:, :2], b[:, :2])
        terms.append(criterion.terms(queries, cut, matches[:, :2], one))
    torch.testing.assert_close(terms[0], terms[1])


def test_agnostic_queries_know_one_class():
    torch.manual_seed(0)
    queries, targets = make_queries(1, 2, 6, classes=1), make_targets(3, 2)
    queries.agnostic = True
    losses = make_criterion()({"": queries}, targets, CANVAS)
    same = [Target(labels=torch.zeros_like(t.labels), boxes=t.boxes) for t in targets]
    queries.agnostic = False
    torch.testing.assert_close(losses, make_criterion()({"": queries}, same, CANVAS))


def test_a_fault_in_a_prediction_is_not_hidden():
    torch.manual_seed(0)
    for part in ("logits", "boxes"):
        queries = make_queries(1, 2, 6)
        with torch.no_grad():
            getattr(queries, part)[0, 1, 3] = torch.nan
        losses = make_criterion()({"": queries}, make_targets(2, 1), CANVAS)
        assert not sum(losses.values()).isfinite()


@pytest.mark.parametrize("kind", ["softmax", "focal"])
def test_extreme_predictions_have_finite_losses_and_gradients(kind):
    torch.manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        logits = (torch.randn(2, 2, 6, CLASSES + (kind == "softmax")) * 1e4).to(dtype)
        boxes = torch.randint(2, (2, 2, 6, 4)).to(dtype)  # no area, all of the canvas, beyond it
        queries = Queries(logits.requires_grad_(), boxes.requires_grad_())
        targets = make_targets(2, 1)
        targets[0].boxes[0, 2:] = targets[0].boxes[0, :2]  # a truth without area
        losses = make_criterion(kind)({"": queries}, targets, CANVAS)
        sum(losses.values()).backward()
        assert all(value.isfinite() for value in losses.values())
        assert queries.boxes.grad.isfinite().all()
        assert queries.logits.grad.isfinite().all()


def test_number_of_truths_is_at_least_one():
    assert count_truths(Truths.from_targets(make_targets(0, 0), CANVAS)) == 1
    assert count_truths(Truths.from_targets(make_targets(4, 2), CANVAS)) == 6


def test_number_of_truths_is_averaged_over_ranks(monkeypatch):
    ranks = torch.distributed
    monkeypatch.setattr(ranks, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks, "get_world_size", lambda: 2)
    monkeypatch.setattr(ranks, "all_reduce", lambda count: count.add_(5))  # the other rank's
    assert count_truths(Truths.from_targets(make_targets(0, 0), CANVAS)) == 2.5


def test_focal_loss_equals_torchvision():
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 6, CLASSES).double() * 5
    labels, matches = torch.randint(CLASSES, (2, 3)), torch.tensor([[[4, 0, 2], [5, -1, -1]]])
    dense = torch.zeros(2, 6, CLASSES).double()
    for image, truth in ((0, 0), (0, 1), (0, 2), (1, 0)):
        dense[image, matches[0, image, truth], labels[image, truth]] = 1
    for alpha, gamma in ((0.25, 2.0), (0.5, 1.5)):
        expected = sigmoid_focal_loss(logits[0], dense, alpha, gamma, reduction="sum") / 4
        loss = FocalLoss(alpha, gamma).loss(logits, labels, matches, torch.tensor(4.0))
        torch.testing.assert_close(loss, expected[None])


class WaitsForDevice(TorchDispatchMode):
    """Counts the operations that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2"):
            self.found.append(name)
        if name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        ):
            self.found.append(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["softmax", "focal"])
def test_a_step_copies_to_the_host_once(monkeypatch, kind):
    torch.manual_seed(0)
    classes = CLASSES + (kind == "softmax")
    queries = {"": make_queries(3, 2, 7, classes), "_encoder": make_queries(1, 2, 30, classes)}
    targets = make_targets(4, 2)
    calls = []

    def count(name):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, **kwargs):
            calls.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)

    for name in ("cpu", "item", "tolist", "__bool__", "__float__", "__int__"):
        count(name)
    with WaitsForDevice() as waits:
        losses = make_criterion(kind)(queries, targets, CANVAS)
        sum(losses.values()).backward()
    monkeypatch.undo()
    assert calls == ["cpu"]
    assert waits.found == []
