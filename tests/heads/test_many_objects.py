"""What holds of every detection head, whatever the truth: none, one, or far more than queries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vitdense.engine.runtime import autocast, to_float
from vitdense.heads.base import Head
from vitdense.registry import HEADS
from vitdense.structures import Frame, Level, Target

LEVELS = [Level(8, 8), Level(12, 16)]
CANVAS = (64, 96)
FRAME = Frame(CANVAS, CANVAS, CANVAS)
CLASSES = 5
QUERIES = 12

# what keeps a head small, where it has such an option
TINY: dict[str, Any] = dict(
    width=32, heads=4, cross_heads=4, points=2, ffn=32, encoder_ffn=32, blocks=1, num_levels=2,
    encoder_layers=1, decoder_layers=2, queries=QUERIES, groups=2, denoising=6, dropout=0.0,
)  # fmt: skip

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "detr": [{}, {"query_kind": "conditional"}, {"query_kind": "dab"}],
}


def detection_heads() -> list[tuple[str, dict[str, Any]]]:
    """Every head of the package that answers boxes, with its variants."""
    names = [n for n in HEADS.names() if HEADS.resolve(n)[0].module.startswith("vitdense.")]
    names = [n for n in names if getattr(HEADS.get(n), "task", None) == "detection"]
    return [(name, options) for name in names for options in VARIANTS.get(name, [{}])]


CASES = [
    pytest.param(name, options, id="-".join((name, *options.values())))
    for name, options in detection_heads()
]
every_head = pytest.mark.parametrize("name, options", CASES)


def build(name: str, options: dict[str, Any], classes: int = CLASSES, **changes: Any) -> Head:
    torch.manual_seed(0)
    known = HEADS.resolve(name)[0].options
    tiny = {key: value for key, value in (TINY | changes).items() if key in known}
    head = HEADS.get(name)(LEVELS, classes, **tiny, **options)
    with torch.no_grad():
        for parameter in head.parameters():  # zeros and ties would hide faults
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return head


def make_features(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(count, 8, 8, 12, generator=generator),
            torch.randn(count, 12, 4, 6, generator=generator)]  # fmt: skip


def make_target(count: int, seed: int = 0) -> Target:
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([CANVAS[1], CANVAS[0]])
    start = torch.rand(count, 2, generator=generator) * 0.7
    end = start + 0.05 + torch.rand(count, 2, generator=generator) * 0.25
    boxes = torch.cat((start * size, end * size), 1)
    return Target(labels=torch.randint(CLASSES, (count,), generator=generator), boxes=boxes)


def degenerate_target() -> Target:
    """Boxes without width, height or both, on the border, outside of it, and the whole canvas."""
    height, width = CANVAS
    boxes = [
        [10, 10, 10, 30], [20, 20, 50, 20], [30, 30, 30, 30], [0, 0, 0, 0],
        [width, height, width, height], [0, 0, 5, height], [width - 4, 0, width, 4],
        [0, 0, width, height], [0, 0, 1e-3, 1e-3], [-8, -8, 4, 4],
    ]  # fmt: skip
    return Target(labels=torch.arange(len(boxes)) % CLASSES, boxes=torch.tensor(boxes).float())


def train(
    head: Head,
    targets: list[Target],
    features: list[Tensor] | None = None,
    precision: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    features = make_features(len(targets)) if features is None else features
    with autocast(torch.device("cpu"), precision):
        outputs = head(features, targets)
    return head.loss(to_float(outputs), targets)


def assert_sound(head: Head, losses: dict[str, Tensor]) -> None:
    """Finite terms, and a finite gradient on every parameter."""
    infinite = {name: term.item() for name, term in losses.items() if not term.isfinite()}
    assert not infinite
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def is_box_term(name: str) -> bool:
    return name.split("_")[0] in {"box", "giou"}


def assert_same_losses(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, term in first.items():
        torch.testing.assert_close(term, second[name], atol=1e-4, rtol=1e-4, msg=f"{name}: differs")


@every_head
@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (0, QUERIES + 1), (QUERIES, 3)])
def test_any_number_of_objects(name, options, counts):
    head = build(name, options)
    losses = train(head, [make_target(count) for count in counts])
    assert_sound(head, losses)
    boxes = [term for key, term in losses.items() if is_box_term(key)]
    assert all((term > 0) == any(counts) for term in boxes)
    assert losses["class"] > 0


@every_head
def test_a_thousand_objects(name, options):
    head = build(name, options)
    assert_sound(head, train(head, [make_target(1000)]))


@every_head
@pytest.mark.parametrize("count", [0, 3, QUERIES, 4 * QUERIES])
def test_as_many_queries_have_a_truth_as_there_can(name, options, count):
    head = build(name, options).eval()
    outputs = head(make_features(1))
    boxes = outputs.boxes.detach().requires_grad_()
    losses = head.loss(replace(outputs, boxes=boxes), [make_target(count)])
    torch.stack([term for key, term in losses.items() if is_box_term(key)]).sum().backward()
    matched = boxes.grad.abs().sum(-1) > 0
    assert (matched.sum(-1) == min(count, QUERIES)).all()


@every_head
def test_classes_that_never_occur(name, options):
    head = build(name, options, classes=60)
    assert_sound(head, train(head, [make_target(3), make_target(2, seed=1)]))
    with torch.no_grad():
        answers = head.eval().predict(head(make_features(2)), [FRAME] * 2)
    for answer in answers:
        assert (answer.labels >= 0).all() and (answer.labels < 60).all()


@every_head
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_degenerate_boxes(name, options, precision):
    head = build(name, options)
    targets = [degenerate_target(), make_target(2)]
    assert_sound(head, train(head, targets, precision=precision))


@every_head
@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_saturated_outputs(name, options, extreme):
    head = build(name, options)
    targets = [degenerate_target(), make_target(2)]
    outputs = head(make_features(2), targets)
    logits = torch.full_like(outputs.logits, extreme).requires_grad_()
    boxes = (outputs.boxes.detach() > 0.5).to(outputs.boxes.dtype).requires_grad_()
    losses = head.loss(replace(outputs, logits=logits, boxes=boxes), targets)
    torch.stack(list(losses.values())).sum().backward()
    assert all(term.isfinite() for term in losses.values())
    assert logits.grad.isfinite().all() and boxes.grad.isfinite().all()


@every_head
def test_the_order_of_the_truth_does_not_matter(name, options):
    head = build(name, options, denoising=0)
    targets = [make_target(7), make_target(4, seed=1)]
    order = torch.Generator().manual_seed(2)
    shuffled = [
        Target(labels=t.labels[index], boxes=t.boxes[index])
        for t in targets
        for index in [torch.randperm(len(t.labels), generator=order)]
    ]
    assert_same_losses(train(head, targets), train(head, shuffled))


@every_head
def test_a_batch_twice_has_the_same_mean_loss(name, options):
    head = build(name, options, denoising=0)
    targets, features = [make_target(7), make_target(0)], make_features(2)
    twice = [torch.cat((x, x)) for x in features]
    assert_same_losses(train(head, targets, features), train(head, targets * 2, twice))


@every_head
def test_losses_of_images_add_up(name, options):
    """A neighbour with many objects, to which the truth is padded, adds its own and no more."""
    head = build(name, options).eval()
    targets, features = [make_target(1), make_target(9, seed=1)], make_features(2)
    both = train(head, targets, features)
    alone = [
        train(head, [target], [x[i : i + 1] for x in features]) for i, target in enumerate(targets)
    ]
    for key in filter(is_box_term, both):
        sums = alone[0][key] * 1 + alone[1][key] * 9
        torch.testing.assert_close(both[key] * 10, sums, atol=1e-3, rtol=1e-4)


@every_head
def test_neighbours_in_the_batch_do_not_matter(name, options):
    head = build(name, options).eval()
    features = make_features(3)
    with torch.no_grad():
        together = head.predict(head(features), [FRAME] * 3)[1]
        (alone,) = head.predict(head([x[1:2] for x in features]), [FRAME])
    torch.testing.assert_close(alone.scores, together.scores, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(alone.boxes, together.boxes, atol=1e-2, rtol=1e-4)
    assert torch.equal(alone.labels, together.labels)


@every_head
def test_answers_below_the_threshold_are_left_out(name, options):
    head = build(name, options).eval()
    with torch.no_grad():
        outputs = head(make_features(2))
        everything = head.predict(outputs, [FRAME] * 2)
        middle = everything[0].scores[4].item()
        for threshold in (middle, 1.0):
            sure = build(name, options, score_threshold=threshold).eval()
            for answer, whole in zip(sure.predict(outputs, [FRAME] * 2), everything, strict=True):
                kept = whole.scores >= threshold
                assert torch.equal(answer.scores, whole.scores[kept])
                assert torch.equal(answer.labels, whole.labels[kept])
                assert torch.equal(answer.boxes, whole.boxes[kept])
