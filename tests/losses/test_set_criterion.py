"""Set losses: equal to a loop over images, unmoved by order, padding and batching."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss
from transformers import LwDetrConfig, RTDetrV2Config
from transformers.loss.loss_lw_detr import LwDetrForObjectDetectionLoss
from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss

from vitdense.heads.detection.denoising import Denoising
from vitdense.losses import set_criterion as module
from vitdense.losses.classification import (
    CLASS_LOSSES,
    FocalLoss,
    IoUAwareLoss,
    SoftmaxLoss,
    VarifocalLoss,
)
from vitdense.losses.matcher import Truths, match
from vitdense.losses.set_criterion import Queries, SetCriterion
from vitdense.structures import Target

CANVAS = (80, 100)
CLASSES = 5
SIGMOID = list(CLASS_LOSSES)


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


def test_focal_loss_equals_torchvision():
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 6, CLASSES).double() * 5
    labels, matches = torch.randint(CLASSES, (2, 3)), torch.tensor([[[4, 0, 2], [5, -1, -1]]])
    dense = torch.zeros(2, 6, CLASSES).double()
    for image, truth in ((0, 0), (0, 1), (0, 2), (1, 0)):
        dense[image, matches[0, image, truth], labels[image, truth]] = 1
    for alpha, gamma in ((0.25, 2.0), (0.5, 1.5)):
        expected = sigmoid_focal_loss(logits[0], dense, alpha, gamma, reduction="sum") / 4
        loss = FocalLoss(alpha, gamma).loss(
            logits, labels, matches, torch.rand(1, 2, 3), torch.tensor(4.0)
        )
        torch.testing.assert_close(loss, expected[None])


@pytest.mark.parametrize("kind", SIGMOID)
def test_groups_equal_a_loop_over_them(kind):
    torch.manual_seed(0)
    queries, targets = make_queries(2, 3, 3 * 7), make_targets(3, 0, 2)
    criterion = SetCriterion(CLASS_LOSSES[kind](), class_cost=2, class_weight=1)
    queries.groups = 3
    together = criterion({"": queries}, targets, CANVAS)
    parts = [
        Queries(queries.logits[:, :, i : i + 7], queries.boxes[:, :, i : i + 7]) for i in (0, 7, 14)
    ]
    apart = [criterion({"": part}, targets, CANVAS) for part in parts]
    mean = {name: sum(each[name] for each in apart) / 3 for name in together}
    torch.testing.assert_close(together, mean)


@pytest.mark.parametrize("kind", SIGMOID)
@pytest.mark.parametrize("counts", [(3, 0, 2), (0, 0, 0)])
def test_identical_groups_equal_one(kind, counts):
    torch.manual_seed(0)
    queries, targets = make_queries(2, 3, 7), make_targets(*counts)
    criterion = SetCriterion(CLASS_LOSSES[kind](), class_cost=2, class_weight=1)
    one = criterion({"": queries}, targets, CANVAS)
    repeated = [x.repeat(1, 1, 4, 1) for x in (queries.logits, queries.boxes)]
    four = criterion({"": Queries(*repeated, groups=4)}, targets, CANVAS)
    torch.testing.assert_close(one, four)
    gradients = [
        torch.autograd.grad(sum(terms.values()), (queries.logits, queries.boxes))
        for terms in (one, four)
    ]
    torch.testing.assert_close(*gradients)


def test_a_group_may_have_fewer_queries_than_truths():
    torch.manual_seed(0)
    queries, targets = make_queries(1, 2, 6), make_targets(5, 1)
    queries.groups = 3
    losses = make_criterion()({"": queries}, targets, CANVAS)
    sum(losses.values()).backward()
    # two queries of each group find a truth in the first image, one in the second
    assert (queries.boxes.grad != 0).any(-1).sum() == 3 * (2 + 1)


@pytest.mark.parametrize("kind", SIGMOID)
def test_known_matches_equal_the_best_ones(kind):
    torch.manual_seed(0)
    targets = make_targets(3, 0, 2)
    truths = Truths.from_targets(targets, CANVAS)
    queries = make_queries(2, 3, 8)
    with torch.no_grad():  # the first queries are nearly the truth
        queries.boxes[:, :, :3] = truths.boxes + 0.01 * torch.randn(2, 3, 3, 4)
    criterion = SetCriterion(CLASS_LOSSES[kind](), class_cost=2, class_weight=1)
    found = criterion({"": queries}, targets, CANVAS)
    known = (
        torch.arange(3)
        .expand(3, -1)
        .masked_fill(torch.arange(3) >= torch.tensor(truths.counts)[:, None], -1)
    )
    given = criterion({"": replace(queries, matches=known)}, targets, CANVAS)
    torch.testing.assert_close(found, given)


def test_known_matches_hold_for_every_group():
    torch.manual_seed(0)
    targets = make_targets(2, 1)
    queries = make_queries(1, 2, 3 * 4)
    known = torch.tensor([[3, 0], [2, -1]])
    losses = make_criterion()({"": replace(queries, groups=3, matches=known)}, targets, CANVAS)
    losses["box"].backward()
    touched = (queries.boxes.grad[0] != 0).any(-1).view(2, 3, 4)
    assert touched.nonzero()[:, [0, 2]].unique(dim=0).tolist() == [[0, 0], [0, 3], [1, 2]]
    assert touched.sum() == 3 * 3


def test_only_unknown_matches_go_to_the_host(monkeypatch):
    torch.manual_seed(0)
    queries = {"": make_queries(2, 2, 6), "_denoising": make_queries(2, 2, 8)}
    queries["_denoising"].matches = torch.tensor([[0, 1, 2], [0, -1, -1]])
    seen = []
    original = module.match
    monkeypatch.setattr(
        module, "match", lambda costs, t: seen.append(len(costs)) or original(costs, t)
    )
    losses = make_criterion()(queries, make_targets(3, 1), CANVAS)
    assert seen == [1]
    assert list(losses)[-1] == "giou_denoising_aux"


def as_labels(targets: list[Target]) -> list[dict]:
    truths = Truths.from_targets(targets, CANVAS)
    return [
        {"class_labels": truths.labels[i, :n], "boxes": truths.boxes[i, :n].double()}
        for i, n in enumerate(truths.counts)
    ]


@pytest.mark.parametrize("counts", [(3, 0, 2), (1, 1, 4), (9, 2, 0)])
def test_all_terms_equal_transformers_rt_detr(counts):
    torch.manual_seed(0)
    targets = make_targets(*counts)
    noisy = Denoising(CLASSES, 4, 20, 0.5, 1.0)(Truths.from_targets(targets, CANVAS))
    size = noisy.queries.shape[1]
    logits = torch.randn(3, 3, size + 12, CLASSES).double()
    boxes = (0.2 + 0.6 * torch.rand(3, 3, size + 12, 4)).double()
    encoder = make_queries(1, 3, 12)
    denoising, own = noisy.split(Queries(logits, boxes))
    parts = {"": own, "_encoder": encoder, "_denoising": denoising}
    ours = SetCriterion(VarifocalLoss(), class_cost=2, class_weight=1)(parts, targets, CANVAS)

    truth = torch.arange(size // noisy.groups // 2)
    starts = torch.arange(noisy.groups) * (size // noisy.groups)
    positives = [(starts[:, None] + truth[:count]).flatten() for count in counts]
    meta = {
        "dn_positive_idx": positives,
        "dn_num_group": noisy.groups,
        "dn_num_split": [size, 12],
    }
    _, theirs, _ = RTDetrForObjectDetectionLoss(
        logits[-1], as_labels(targets), "cpu", boxes[-1], RTDetrV2Config(num_labels=CLASSES),
        logits.transpose(0, 1), boxes.transpose(0, 1), encoder.logits[0], encoder.boxes[0], meta,
    )  # fmt: skip
    expected = {}
    for name, term in (("class", "vfl"), ("box", "bbox"), ("giou", "giou")):
        term = f"loss_{term}"
        expected[name] = theirs[term]
        expected[name + "_aux"] = theirs[term + "_aux_0"] + theirs[term + "_aux_1"]
        expected[name + "_encoder"] = theirs[term + "_aux_2"]
        expected[name + "_denoising"] = theirs[term + "_dn_2"]
        expected[name + "_denoising_aux"] = theirs[term + "_dn_0"] + theirs[term + "_dn_1"]
    assert len(theirs) == 3 * (1 + 3 + 3) and ours.keys() == expected.keys()
    for name, value in expected.items():  # transformers takes overlaps in float32
        torch.testing.assert_close(ours[name], value.double(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("counts", [(3, 0, 2), (1, 1, 4)])
def test_all_terms_equal_transformers_lw_detr(counts):
    torch.manual_seed(0)
    targets = make_targets(*counts)
    queries, encoder = make_queries(3, 3, 2 * 8), make_queries(1, 3, 2 * 8)
    queries.groups = encoder.groups = 2
    ours = SetCriterion(IoUAwareLoss(), class_cost=2, class_weight=1)(
        {"": queries, "_encoder": encoder}, targets, CANVAS
    )
    config = LwDetrConfig(num_labels=CLASSES, group_detr=2, decoder_layers=3)
    assert (config.class_cost, config.bbox_cost, config.giou_cost) == (2, 5, 2)
    _, theirs, _ = LwDetrForObjectDetectionLoss(
        queries.logits[-1], as_labels(targets), "cpu", queries.boxes[-1], config,
        queries.logits, queries.boxes, encoder.logits[0], encoder.boxes[0],
    )  # fmt: skip
    for name, term, weight in (("class", "ce", 1), ("box", "bbox", 5), ("giou", "giou", 2)):
        expected = {
            name: theirs[f"loss_{term}"],
            name + "_aux": theirs[f"loss_{term}_0"] + theirs[f"loss_{term}_1"],
            name + "_encoder": theirs[f"loss_{term}_enc"],
        }
        for key, value in expected.items():
            torch.testing.assert_close(ours[key], weight * value.double(), atol=1e-6, rtol=1e-6)


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
