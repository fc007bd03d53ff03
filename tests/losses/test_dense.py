"""Dense losses equal torch's and smp's, and survive crops without a labelled pixel."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from segmentation_models_pytorch import losses as smp
from torch import Tensor

from vitdense.losses.dense import NAMES, DenseLoss
from vitdense.losses.pixels import balance, boundary, hard_cross_entropy
from vitdense.structures import IGNORE

CLASSES = 5


@pytest.fixture
def logits() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, CLASSES, 12, 16, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def labels() -> Tensor:
    torch.manual_seed(1)
    labels = torch.randint(CLASSES - 1, (2, 12, 16))  # the last class is absent
    labels[torch.rand(labels.shape) < 0.3] = IGNORE
    return labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 0.0, 1.0, 7.0]])
def test_cross_entropy_equals_torchs(
    logits: Tensor, labels: Tensor, weights: list[float] | None, smoothing: float
) -> None:
    criterion = DenseLoss(CLASSES, class_weights=weights, label_smoothing=smoothing)
    expected = F.cross_entropy(
        logits,
        labels,
        None if weights is None else torch.tensor(weights, dtype=torch.float64),
        ignore_index=IGNORE,
        label_smoothing=smoothing,
    )
    ours = criterion(logits, labels)["cross_entropy"]
    assert torch.allclose(ours, expected, atol=1e-12)
    for ours_grad, grad in zip(
        torch.autograd.grad(ours, logits), torch.autograd.grad(expected, logits), strict=True
    ):
        assert torch.allclose(ours_grad, grad, atol=1e-12)


REFERENCES = {
    "dice": smp.DiceLoss("multiclass", ignore_index=IGNORE),
    "focal": smp.FocalLoss("multiclass", ignore_index=IGNORE, gamma=2.0),
    "lovasz": smp.LovaszLoss("multiclass", ignore_index=IGNORE),
    "tversky": smp.TverskyLoss("multiclass", ignore_index=IGNORE, alpha=0.3, beta=0.7),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_overlap_losses_equal_smps(logits: Tensor, labels: Tensor, name: str) -> None:
    term = DenseLoss(CLASSES, {name: 2.5})(logits, labels)[name]
    assert torch.allclose(term, 2.5 * REFERENCES[name](logits.float(), labels))


def test_tversky_weighs_misses_more_than_false_alarms() -> None:
    truth = torch.zeros(1, 10, 10, dtype=torch.int64)
    truth[:, :5] = 1
    answer = torch.zeros_like(truth)
    answer[:, :3] = 1  # two rows of class 1 are missed, and are false alarms of class 0
    logits = 20.0 * F.one_hot(answer, 2).permute(0, 3, 1, 2)
    loss = DenseLoss(2, {"tversky": 1.0})(logits, truth)["tversky"]
    ratios = 5 / (5 + 0.3 * 2), 3 / (3 + 0.7 * 2)
    assert loss.item() == pytest.approx(1 - sum(ratios) / 2, abs=1e-5)


def test_ignored_pixels_get_no_gradient(logits: Tensor, labels: Tensor) -> None:
    criterion = DenseLoss(CLASSES, dict.fromkeys(NAMES, 1.0))
    sum(criterion(logits, labels).values()).backward()
    ignored = (labels == IGNORE)[:, None].expand_as(logits)
    assert not logits.grad[ignored].any()
    assert logits.grad[~ignored].any()


@pytest.mark.parametrize("weights", [None, [1.0] * CLASSES])
def test_all_ignored_is_zero_with_a_gradient(logits: Tensor, weights: list[float] | None) -> None:
    criterion = DenseLoss(CLASSES, dict.fromkeys(NAMES, 1.0), weights, 0.1)
    terms = criterion(logits, torch.full((2, 12, 16), IGNORE))
    assert list(terms) == list(NAMES)
    for term in terms.values():
        (grad,) = torch.autograd.grad(term, logits, retain_graph=True)
        assert term.item() == 0.0
        assert grad.shape == logits.shape and not grad.any()


def test_classes_of_weight_zero_alone_are_zero(logits: Tensor) -> None:
    criterion = DenseLoss(CLASSES, class_weights=[0.0, 1.0, 1.0, 1.0, 1.0])
    terms = criterion(logits, torch.zeros(2, 12, 16, dtype=torch.int64))
    assert terms["cross_entropy"].item() == 0.0


def test_one_ignored_image_does_not_change_the_mean_of_the_other(
    logits: Tensor, labels: Tensor
) -> None:
    labels[1] = IGNORE
    criterion = DenseLoss(CLASSES)
    alone = criterion(logits[:1], labels[:1])["cross_entropy"]
    assert torch.allclose(criterion(logits, labels)["cross_entropy"], alone)


def test_a_loss_has_no_state_and_can_be_copied(logits: Tensor, labels: Tensor) -> None:
    criterion = DenseLoss(CLASSES, dict.fromkeys(NAMES, 1.0), [1.0, 2.0, 3.0, 4.0, 5.0])
    assert not criterion.state_dict() and not list(criterion.parameters())
    copied = copy.deepcopy(criterion)(logits, labels)
    for name, term in criterion(logits, labels).items():
        assert torch.equal(term, copied[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"losses": {"crossentropy": 1.0}},
            "losses: no 'crossentropy'. Did you mean 'cross_entropy'",
        ),
        ({"losses": {"hinge": 1.0}}, "losses: no 'hinge'. Known: cross_entropy, ohem, dice"),
        ({"losses": {}}, "losses: names no loss"),
        ({"class_weights": [1.0, 2.0]}, "class_weights: has 2 numbers, the data 5 classes"),
        ({"class_weights": [0.0] * 5}, "class_weights: all are 0, so that nothing"),
        (
            {"losses": {"dice": 1.0}, "class_weights": [1.0] * CLASSES},
            "class_weights: is for `cross_entropy`",
        ),
        ({"losses": {"dice": 1.0}, "label_smoothing": 0.1}, "label_smoothing: is for `cross_ent"),
    ],
)
def test_wrong_options_are_explained(options: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        DenseLoss(CLASSES, **options)
    assert str(error.value).startswith(message)


def hard_pixels_by_hand(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The definition in the paper's words, pixel by pixel."""
    each = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    flat = [(loss, weights[label]) for loss, label in zip(each.flatten(), labels.flatten(),
            strict=True) if label != IGNORE]  # fmt: skip
    flat.sort(key=lambda pair: -pair[0].item())
    least = max(1, len(flat) // 16)
    hard = [p for i, p in enumerate(flat) if i < least or p[0].exp().reciprocal() < 0.7]
    return sum(loss * weight for loss, weight in hard) / sum(weight for _, weight in hard)


@pytest.mark.parametrize("sureness", [0.1, 3.0, 60.0])
def test_hard_cross_entropy_is_that_of_the_hard_pixels(
    logits: Tensor, labels: Tensor, sureness: float
) -> None:
    right = F.one_hot(labels.where(labels != IGNORE, 0), CLASSES).movedim(-1, 1)
    sure = logits + sureness * right
    weights = torch.tensor([0.5, 2.0, 1.0, 1.0, 7.0], dtype=torch.float64)
    expected = hard_pixels_by_hand(sure, labels, weights)
    assert torch.allclose(hard_cross_entropy(sure, labels, weights), expected)


def test_boundary_is_small_for_outlines_two_pixels_off_and_large_beyond() -> None:
    def at(column: int) -> Tensor:
        labels = torch.zeros(1, 16, 24, dtype=torch.int64)
        labels[:, :, column:] = 1
        return labels

    def loss(column: int) -> float:
        logits = 30.0 * F.one_hot(at(column), 3).movedim(-1, 1)
        return boundary(logits, at(10)).item()

    assert loss(10) == pytest.approx(0, abs=1e-5)
    assert loss(11) == pytest.approx(0, abs=1e-5)  # two pixels belong to the other class's outline
    assert loss(16) == pytest.approx(1, abs=1e-5)


def test_boundary_ignores_the_edge_of_ignored_regions() -> None:
    labels = torch.zeros(1, 12, 12, dtype=torch.int64)
    labels[:, 4:8] = IGNORE
    logits = torch.randn(1, 2, 12, 12)
    assert boundary(logits, labels).item() == 0


def test_balanced_weights_of_frequencies_by_hand() -> None:
    pixels = torch.tensor([600, 300, 0, 100])
    shared = torch.tensor([1000, 400, 0, 200])
    inverse = balance(pixels, shared, median=False)
    assert torch.allclose(inverse[[0, 1, 3]] * torch.tensor([6.0, 3.0, 1.0]), inverse[3])
    assert inverse[[0, 1, 3]].mean() == pytest.approx(1) and inverse[2] == 1
    # frequencies 0.6, 0.75, 0.5: the median is 0.6
    expected = torch.tensor([1.0, 0.8, 1.0, 1.2])
    assert torch.allclose(balance(pixels, shared, median=True), expected)


def test_a_balanced_loss_weighs_what_the_data_lacks(logits: Tensor, labels: Tensor) -> None:
    criterion = DenseLoss(CLASSES, class_weights="inverse")
    plain = DenseLoss(CLASSES)(logits, labels)["cross_entropy"]
    assert torch.allclose(criterion(logits, labels)["cross_entropy"], plain)  # not told yet
    pixels = torch.tensor([8, 4, 2, 1, 1])
    criterion.set_frequencies(pixels, pixels)
    weights = balance(pixels, pixels, median=False)
    expected = F.cross_entropy(logits, labels, weights.to(logits), ignore_index=IGNORE)
    assert torch.allclose(criterion(logits, labels)["cross_entropy"], expected)
