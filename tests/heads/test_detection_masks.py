"""`masks: true` on detection heads: costs, losses and answers; boxes stay what they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_convert, box_iou
from transformers.models.mask2former.modeling_mask2former import (
    dice_loss,
    pair_wise_dice_loss,
    pair_wise_sigmoid_cross_entropy_loss,
    sigmoid_cross_entropy_loss,
)

from vitdense import HEADS
from vitdense.data.loader import training_loader
from vitdense.data.shapes import ShapesDataset
from vitdense.data.transforms import DetectionPolicy
from vitdense.heads.base import Head
from vitdense.heads.detection.masks import MaskBranch
from vitdense.losses import dot_masks
from vitdense.losses.dot_masks import DotMasks
from vitdense.losses.points import sample_maps
from vitdense.ops import rows
from vitdense.ops.masks import masks_to_boxes
from vitdense.ops.restoring import restore_products
from vitdense.structures import Frame, Level, Target
from vitdense.testing import check_head

LEVELS = [Level(6, 4), Level(8, 8), Level(12, 16)]
CANVAS = (64, 96)
TINY: dict[str, dict[str, Any]] = {
    "rtdetr": dict(encoder_ffn=32, blocks=1, num_levels=2, denoising=6),
    "dino": dict(encoder_layers=1, num_levels=2, denoising=6),
    "lwdetr": dict(cross_heads=4, groups=3),
}
every_head = pytest.mark.parametrize("name", TINY)


def build(name: str, levels: list[Level] = LEVELS, classes: int = 3, **options: Any) -> Head:
    torch.manual_seed(0)
    tiny = dict(width=32, heads=4, ffn=32, decoder_layers=2, queries=12)
    return HEADS.get(name)(levels, classes, **(tiny | TINY[name] | options))


def make_features(batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = [(CANVAS[0] // level.stride, CANVAS[1] // level.stride) for level in LEVELS]
    return [
        torch.randn(batch, level.channels, *size, generator=generator)
        for level, size in zip(LEVELS, sizes, strict=True)
    ]


def make_target(count: int, size: tuple[int, int] = CANVAS, cell: int = 4) -> Target:
    """Rectangles of whole cells."""
    masks = torch.zeros(count, *size, dtype=torch.bool)
    boxes = torch.zeros(count, 4)
    for i in range(count):
        top, left = (int(cell * torch.randint(side // cell // 2, ())) for side in size)
        bottom, right = (x + cell * int(torch.randint(2, 6, ())) for x in (top, left))
        masks[i, top:bottom, left:right] = True
        boxes[i] = torch.tensor([left, top, min(right, size[1]), min(bottom, size[0])])
    return Target(labels=torch.randint(3, (count,)), boxes=boxes, masks=masks)


@pytest.mark.parametrize(
    "name, options",
    [
        ("rtdetr", {}),
        ("rtdetr", {"distribution": True, "levels": [Level(8, 8), Level(12, 16)]}),
        ("dino", {"levels": [Level(8, 16)], "look_twice": False}),
        ("lwdetr", {}),
        ("lwdetr", {"levels": [Level(32, 16)], "aux_loss": False}),
    ],
)
def test_keeps_what_heads_keep(name, options):
    levels = options.pop("levels", LEVELS)
    check_head(lambda *facts, **_: build(name, facts[0], masks=True, **options), levels=levels)


@every_head
def test_boxes_do_not_change(name):
    """Same parameters from the same seed, same outputs, to the last bit."""
    plain, masked = build(name).eval(), build(name, masks=True).eval()
    assert (plain.task, masked.task) == ("detection", "instance")
    state = masked.state_dict()
    assert {k for k in state if not k.startswith("masks.")} == set(plain.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())
    first, second = plain(make_features()), masked(make_features())
    assert torch.equal(first.logits, second.logits) and torch.equal(first.boxes, second.boxes)
    assert first.pixels is None and not first.details
    frames = [Frame(CANVAS, CANVAS, CANVAS)] * 2
    for a, b in zip(plain.predict(first, frames), masked.predict(second, frames), strict=True):
        assert torch.equal(a.boxes, b.boxes) and torch.equal(a.scores, b.scores)
        assert a.masks is None and b.masks.shape == (len(b.boxes), *CANVAS)


@every_head
def test_masks_are_those_of_the_answers_that_are_left(name):
    head = build(name, masks=True).eval()
    frames = [Frame(CANVAS, CANVAS, (32, 48))] * 2
    outputs = head(make_features())
    everything = head.predict(outputs, frames)
    head.score_threshold = everything[0].scores[3].item()
    for answer, whole in zip(head.predict(outputs, frames), everything, strict=True):
        count = int((whole.scores >= head.score_threshold).sum())
        assert torch.equal(answer.masks, whole.masks[:count])
    head.score_threshold = 1.0
    for answer in head.predict(outputs, frames):
        assert answer.masks.shape == (0, 32, 48) and answer.boxes.shape == (0, 4)


@every_head
def test_terms_of_every_part_that_has_queries(name):
    head, targets = build(name, masks=True), [make_target(3), make_target(0)]
    losses = head.loss(head(make_features(), targets), targets)
    suffixes = ["", "_aux"] + (["_denoising", "_denoising_aux"] if name != "lwdetr" else [])
    found = {key for key in losses if key.startswith(("mask", "dice"))}
    assert found == {kind + suffix for kind in ("mask", "dice") for suffix in suffixes}
    assert all(losses[key] > 0 for key in found)
    plain = build(name)
    assert not {"mask", "dice"} & set(plain.loss(plain(make_features(), targets), targets))


def test_truth_without_masks_is_refused():
    head, targets = build("rtdetr", masks=True), [make_target(2), make_target(1)]
    targets[1].masks = None
    with pytest.raises(ValueError, match="set `masks: true` of the data set coco"):
        head.loss(head(make_features(), targets), targets)


@every_head
@pytest.mark.parametrize("option", [{"mask_weight": 5.0}, {"mask_points": 64}], ids=str)
def test_options_of_masks_need_masks(name, option):
    with pytest.raises(ValueError, match=f"^{next(iter(option))}: .*masks: true"):
        build(name, **option)
    assert build(name, masks=True, **option).task == "instance"


def test_matching_weighs_classes_as_told():
    assert build("dino").criterion.matcher.class_weight == 2.0
    assert build("dino", class_cost=4.0).criterion.matcher.class_weight == 4.0


@pytest.fixture
def masks(monkeypatch):
    """Two images with masks and pixel features of stride 4, in float64, and the points drawn."""
    torch.manual_seed(0)
    targets = [make_target(3), make_target(2)]
    pixels = torch.randn(2, 8, CANVAS[0] // 4, CANVAS[1] // 4).double().requires_grad_()
    places = torch.rand(2, 200, 2).double()
    monkeypatch.setattr(dot_masks, "random_points", lambda *_: places)
    return DotMasks(pixels, targets, points=200, weight=2.0), targets, places


def dense(pixels: Tensor, embeddings: Tensor) -> Tensor:
    return torch.einsum("lbqm,bmhw->lbqhw", embeddings, pixels)


def test_costs_equal_transformers_on_all_masks(masks):
    ours, _, places = masks
    embeddings = torch.randn(3, 2, 7, 8).double()
    cost = ours.cost(embeddings)
    assert cost.shape == (3, 2, 3, 7)
    assert (cost[:, 1, 2] == 0).all()  # padding
    logits = sample_maps(dense(ours.pixels, embeddings).transpose(0, 1).flatten(1, 2), places)
    logits = logits.unflatten(1, (3, 7))
    for layer, image in [(0, 0), (2, 0), (1, 1)]:
        each, truth = logits[image, layer], ours.truth[image]
        bce = pair_wise_sigmoid_cross_entropy_loss(each, truth)
        expected = 2 * (bce + pair_wise_dice_loss(each, truth))
        torch.testing.assert_close(cost[layer, image, : len(truth)], expected.T)


def test_few_layers_at_a_time_cost_the_same(masks, monkeypatch):
    ours, _, _ = masks
    embeddings = torch.randn(5, 2, 7, 8).double()
    whole = ours.cost(embeddings)
    monkeypatch.setattr(dot_masks, "CHUNK", 2 * 7 * 200)
    torch.testing.assert_close(ours.cost(embeddings), whole)


def test_terms_equal_transformers_on_all_cells(masks, monkeypatch):
    """At the centres of all cells, where the true masks are whole."""
    ours, targets, _ = masks
    height, width = ours.pixels.shape[-2:]
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height,
                          (torch.arange(width) + 0.5) / width, indexing="ij")  # fmt: skip
    centres = torch.stack((x, y), -1).flatten(0, 1)
    monkeypatch.setattr(
        dot_masks, "uncertain_points", lambda maps, count: centres.expand(len(maps), -1, -1)
    )
    embeddings = torch.randn(2, 2, 7, 8).double()
    matches = torch.tensor([[[4, 0, 6], [1, 2, -1]], [[3, -1, 2], [0, 5, -1]]])
    terms = ours.terms(embeddings, matches)
    maps = dense(ours.pixels, embeddings)
    for layer in range(2):
        rows = [(i, t) for i in range(2) for t in range(3) if matches[layer, i, t] >= 0]
        logits = torch.stack([maps[layer, i, matches[layer, i, t]] for i, t in rows]).flatten(1)
        truth = torch.stack([targets[i].masks[t, 2::4, 2::4] for i, t in rows]).flatten(1).double()
        for name, theirs in (("mask", sigmoid_cross_entropy_loss), ("dice", dice_loss)):
            expected = theirs(logits, truth, 1)  # the centres are float32
            torch.testing.assert_close(terms[name][layer], expected, atol=1e-5, rtol=1e-6)


def test_many_maps_are_made_again_in_the_backward(masks, monkeypatch):
    """Few layers at a time; losses and gradients stay what they are, and no map is kept."""
    ours, _, _ = masks
    embeddings = torch.randn(5, 2, 7, 8).double().requires_grad_()
    matches = torch.tensor([[[4, 0, 6], [1, 2, -1]]]).expand(5, -1, -1)
    maps = 2 * 16 * 24  # of the second image, of one layer

    def run() -> tuple[list[Tensor], int]:
        torch.manual_seed(0)
        kept = [0]

        def keep(x: Tensor) -> Tensor:
            kept.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            terms = ours.terms(embeddings, matches)
        total = (terms["mask"] + 2 * terms["dice"]).sum()
        grads = torch.autograd.grad(total, [embeddings, ours.pixels])
        return [terms["mask"], terms["dice"], *grads], max(kept)

    monkeypatch.setattr(dot_masks, "CHUNK", 1)
    found, kept = run()
    monkeypatch.setattr(dot_masks, "checkpoint", lambda function, *args, **_: function(*args))
    expected, kept_before = run()
    assert kept < maps <= kept_before
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_masks_decide_between_equal_boxes():
    """Two objects of one class in one box, and two queries that differ by their masks alone."""
    head = build("rtdetr", masks=True, denoising=0, decoder_layers=1)
    halves = torch.zeros(2, *CANVAS, dtype=torch.bool)
    halves[0, :32], halves[1, 32:] = True, True
    target = Target(torch.zeros(2).long(), torch.tensor([[0.0, 0, 96, 64]] * 2), halves)
    outputs = head([x[:1] for x in make_features()], [target])
    pixels = torch.ones(1, 1, 16, 24)
    pixels[..., 8:, :] = -1
    for signs in ([1.0, -1.0], [-1.0, 1.0]):
        embeddings = 9 * torch.tensor(signs)[None, None, :, None]
        changed = replace(
            outputs,
            logits=torch.zeros(1, 1, 2, 3),
            boxes=torch.tensor([0.5, 0.5, 1, 1]).expand(1, 1, 2, 4),
            details={"embeddings": embeddings},
            pixels=pixels,
        )
        losses = head.loss(changed, [target])
        # a wrong one would cost 9; all that is left is the blur between the halves
        assert losses["mask"] < 0.2 and losses["dice"] < 0.2


def test_a_fault_is_shown_and_not_hidden():
    head, targets = build("lwdetr", masks=True), [make_target(2), make_target(1)]
    outputs = head(make_features(), targets)
    outputs.details["embeddings"] = outputs.details["embeddings"] * torch.nan
    assert head.loss(outputs, targets)["mask"].isnan()


@every_head
def test_more_objects_than_queries_and_masks_without_pixels(name):
    head, targets = build(name, masks=True), [make_target(40), make_target(2)]
    targets[1].masks = torch.zeros_like(targets[1].masks)
    losses = head.loss(head(make_features(), targets), targets)
    torch.stack(list(losses.values())).sum().backward()
    assert all(term.isfinite() for term in losses.values())
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest new float tensor has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point() and result._base is None:
            self.numbers = max(self.numbers, result.numel())
        return result


def test_masks_of_unmatched_queries_are_never_made():
    queries, layers, side = 500, 3, 64
    targets = [make_target(2, (128, 128))]
    pixels = torch.randn(1, 4, side, side)
    embeddings = torch.randn(layers, 1, queries, 4).requires_grad_()
    with Largest() as largest:
        ours = DotMasks(pixels, targets, points=64, weight=1.0)
        ours.cost(embeddings)
        terms = ours.terms(embeddings, torch.tensor([[[7, 8]]]).expand(layers, -1, -1))
        (terms["mask"] + terms["dice"]).sum().backward()
    assert largest.numbers <= layers * queries * 64
    assert largest.numbers < queries * side * side / 20


FRAMES = [
    Frame(CANVAS, CANVAS, CANVAS),
    Frame(CANVAS, (50, 96), (101, 193)),
    Frame(CANVAS, (64, 70), (32, 35)),
]


@pytest.mark.parametrize("frame", FRAMES, ids=str)
def test_masks_lie_in_original_pixels(frame, monkeypatch):
    torch.manual_seed(0)
    embeddings, pixels = torch.randn(5, 8), torch.randn(8, 16, 24)
    logits = frame.restore_map(torch.einsum("nm,mhw->nhw", embeddings, pixels))
    sure = logits.abs() > 1e-5  # the order of a sum is another for fewer rows
    assert sure.float().mean() > 0.999
    for chunk in (2**20, 1, 1000):
        monkeypatch.setitem(rows.CHUNK, "cpu", chunk)
        found = restore_products(embeddings, pixels, frame)
        assert torch.equal(found[sure], logits[sure] > 0)
    assert restore_products(embeddings[:0], pixels, frame).shape == (0, *frame.original)


@pytest.mark.parametrize("chunk", [3000, 600 * 400])
def test_memory_of_answers_is_bounded(chunk, monkeypatch):
    monkeypatch.setitem(rows.CHUNK, "cpu", chunk)
    frame = Frame((64, 96), (60, 90), (400, 600))
    with Largest() as largest:
        restore_products(torch.randn(40, 4), torch.randn(4, 16, 24), frame)
    assert largest.numbers <= max(chunk, 40 * 600)


@pytest.mark.parametrize("nms", [None, 0.5])
def test_each_detection_has_the_mask_of_its_query(nms):
    head = build("rtdetr", masks=True, nms=nms, max_detections=6, denoising=0).eval()
    with torch.no_grad():
        outputs = head(make_features())
    outputs.boxes = 0.2 + 0.2 * torch.rand_like(outputs.boxes)
    maps = dense(outputs.pixels, outputs.details["embeddings"])[-1]
    frame = FRAMES[0]
    for i, answer in enumerate(head.predict(outputs, [frame] * 2)):
        boxes = box_convert(outputs.boxes[-1, i], "cxcywh", "xyxy")
        queries = box_iou(answer.boxes, boxes * torch.tensor([96.0, 64, 96, 64])).argmax(1)
        assert len(queries) > 1
        assert torch.equal(answer.masks, frame.restore_map(maps[i, queries]) > 0)


@pytest.mark.parametrize(
    "strides, finest, lateral, size",
    [
        ([4, 8, 16], 1, 0, (16, 24)),
        ([8, 16], 0, None, (16, 24)),
        ([16], 0, None, (16, 24)),
        ([2, 4, 8], 2, 1, (16, 24)),
        ([4, 8], 0, None, (16, 24)),
    ],
)
def test_pixels_have_stride_4(strides, finest, lateral, size):
    levels = [Level(8, stride) for stride in strides]
    made = MaskBranch(levels, finest, 8)
    assert made.level == lateral
    features = [torch.randn(1, 8, 64 // s, 96 // s) for s in strides]
    assert made(features[finest], features).shape[-2:] == size


def test_pixels_of_patch_14_have_the_size_of_its_finer_map():
    levels = [Level(8, 3.5), Level(8, 7), Level(8, 14)]
    features = [torch.randn(1, 8, 20, 20), torch.randn(1, 8, 10, 10), torch.randn(1, 8, 5, 5)]
    assert MaskBranch(levels, 1, 8)(features[1], features).shape[-2:] == (20, 20)
    assert MaskBranch(levels[2:], 0, 8)(features[2], features[2:]).shape[-2:] == (20, 20)


def test_copy_paste_and_mosaic_give_masks_to_learn_from(tmp_path):
    data = ShapesDataset(tmp_path, "train", task="instance", images=12, size=64)
    policy = DetectionPolicy(size=64, copy_paste=1.0, mosaic=0.5)
    head = build("rtdetr", classes=len(data.classes), masks=True)
    batches = training_loader(data, policy, 4, 16, workers=0, seed=0)
    for _, batch in zip(range(3), batches, strict=False):
        for target in batch.targets:
            assert target.masks.shape == (len(target.labels), 64, 64)
        features = [
            torch.randn(4, level.channels, 64 // level.stride, 64 // level.stride)
            for level in LEVELS
        ]
        losses = head.loss(head(features, batch.targets), batch.targets)
        assert all(term.isfinite() for term in losses.values())


@pytest.mark.parametrize(
    "name", ["rtdetr", *(pytest.param(n, marks=pytest.mark.slow) for n in ("dino", "lwdetr"))]
)
def test_learns_masks_by_heart(name):
    torch.manual_seed(0)
    targets = [make_target(3, (64, 64)), make_target(2, (64, 64))]
    targets = [replace(t, boxes=masks_to_boxes(t.masks)) for t in targets]
    images = torch.zeros(2, 3, 64, 64)
    for image, target in zip(images, targets, strict=True):
        for label, mask in zip(target.labels, target.masks, strict=True):
            image[label, mask] = 1
    levels = [Level(16, 4), Level(32, 8), Level(32, 16)]
    head = build(name, levels, masks=True, queries=20)
    stem = nn.ModuleList([nn.Conv2d(3, 16, 4, 4), nn.Conv2d(16, 32, 2, 2), nn.Conv2d(32, 32, 2, 2)])
    parameters = [*stem.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0)

    def run() -> Any:
        maps = [images]
        for layer in stem:
            maps.append(layer(maps[-1]).relu())
        return head(maps[1:], targets)

    for _ in range(200):
        loss = sum(head.loss(run(), targets).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    head.eval()
    with torch.no_grad():
        answers = head.predict(run(), [Frame((64, 64), (64, 64), (64, 64))] * 2)
    for answer, target in zip(answers, targets, strict=True):
        found = answer.masks[: len(target.masks)].flatten(1)[:, None]
        there = target.masks.flatten(1)[None]
        overlaps = (found & there).sum(-1) / (found | there).sum(-1)
        assert overlaps.amax(0).min() > 0.8
