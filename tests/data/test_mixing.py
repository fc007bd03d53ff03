"""Mosaic, MixUp, Copy-Paste, canvases of several scales, and the last span without them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torchvision.transforms import v2

from vitdense.data.base import DataError, Dataset
from vitdense.data.loader import training_loader
from vitdense.data.mixing import blend, draw_quadrants, paste
from vitdense.data.shapes import ShapesDataset
from vitdense.data.transforms import DetectionPolicy, SegmentationPolicy
from vitdense.ops.masks import masks_to_boxes
from vitdense.structures import IGNORE, Sample, Target

SIZE = (60, 90)


def plain(label: int, boxes: list[list[int]], crowd: bool = False) -> Sample:
    """Rectangles of one class, all of its color, with boxes, masks and semantic labels."""
    masks = torch.zeros(len(boxes), *SIZE, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = True
    semantic = torch.where(masks.any(0), label, 9).to(torch.uint8)
    image = (masks.any(0) * (30 * (label + 1)) + (~masks.any(0)) * 5).to(torch.uint8)
    truth = Target(
        torch.full((len(boxes),), label),
        torch.tensor(boxes).float().reshape(-1, 4),
        masks,
        semantic,
        torch.tensor([crowd] * len(boxes), dtype=torch.bool),
    )
    return Sample(image.expand(3, -1, -1), truth, label, SIZE, Path(f"{label}.png"))


def scene() -> tuple[Sample, Callable[[], Sample]]:
    """A sample of class 0, and others of classes 1, 2, ..., drawn one after the other."""
    boxes = [[4, 6, 30, 28], [50, 20, 84, 52], [10, 38, 28, 56]]
    others = iter([plain(label, boxes) for label in range(1, 7)])
    return plain(0, boxes), lambda: next(others)


@pytest.mark.parametrize("fit", ["stretch", "keep_ratio"])
def test_a_mosaic_keeps_pixels_boxes_and_masks_together(fit):
    policy = DetectionPolicy(size=(72, 64), resize=fit, mosaic=1.0, photometric=0, iou_crop=0)
    seen: set[int] = set()
    for seed in range(60):
        torch.manual_seed(seed)
        mixed = policy.compose(*scene())
        truth = mixed.target
        assert mixed.image.shape == (3, 72, 64) and truth.masks.shape[1:] == (72, 64)
        assert len(truth.labels) == len(truth.boxes) == len(truth.masks)
        assert truth.crowd is None and truth.area is None
        assert ((truth.boxes - masks_to_boxes(truth.masks)).abs() <= 2).all()
        for label, mask in zip(truth.labels.tolist(), truth.masks, strict=True):
            outside = torch.nn.functional.pad((~mask)[None].float(), (2, 2, 2, 2), value=1)
            core = torch.nn.functional.max_pool2d(outside, 5, 1)[0] == 0
            assert (mixed.image[0][core] == 30 * (label + 1)).all()
            assert (truth.semantic[mask] == label).all()
        assert ((truth.semantic == IGNORE) <= (mixed.image[0] == 0)).all()
        seen |= set(truth.labels.tolist())
        assert len(set(truth.labels.tolist())) >= 3
    assert seen == {0, 1, 2, 3}


def test_quadrants_tile_the_canvas():
    for seed in range(50):
        torch.manual_seed(seed)
        covered = torch.zeros(33, 50, dtype=torch.int)
        for (top, left), (height, width) in draw_quadrants((33, 50)):
            covered[top : top + height, left : left + width] += 1
            assert height >= 0.3 * 33 - 1 and width >= 0.3 * 50 - 1
        assert (covered == 1).all()


def test_a_blend_weighs_pixels_and_keeps_all_objects():
    first, second = plain(0, [[4, 6, 30, 28]]), plain(3, [[50, 20, 84, 52], [10, 38, 28, 56]])
    first.target.semantic = second.target.semantic = None
    torch.manual_seed(0)
    weight = 0.45 + 0.1 * torch.rand(()).item()
    torch.manual_seed(0)
    mixed = blend(first, second)
    expected = weight * first.image.float() + (1 - weight) * second.image.float()
    assert (mixed.image.float() - expected).abs().max() <= 0.5 + 1e-4
    assert mixed.image.dtype == torch.uint8
    assert mixed.target.labels.tolist() == [0, 3, 3]
    assert torch.equal(mixed.target.boxes, torch.cat([first.target.boxes, second.target.boxes]))
    assert torch.equal(mixed.target.masks[0], first.target.masks[0])
    assert (mixed.image_id, mixed.path) == (first.image_id, first.path)
    assert first.target.labels.tolist() == [0]


def test_a_label_map_cannot_be_blended():
    with pytest.raises(DataError, match=r"^0\.png: has a label map.* leave out the option mixup"):
        blend(*(plain(label, [[4, 6, 30, 28]]) for label in (0, 1)))


@pytest.mark.parametrize("option", ["mixup", "copy_paste"])
def test_panoptic_truth_cannot_be_mixed(shapes_root, option):
    policy = DetectionPolicy(size=32, **{option: 0.1})
    for task in ("panoptic", "instance"):
        dataset = ShapesDataset(shapes_root, "train", task=task, images=24, size=96)
        if task == "panoptic":
            with pytest.raises(DataError, match=f"panoptic truth.* leave out the option {option}"):
                training_loader(dataset, policy, 2, workers=0)
            training_loader(dataset, DetectionPolicy(mosaic=1.0), 2, workers=0)
        else:
            assert next(training_loader(dataset, policy, 2, workers=0)).images.shape[0] == 2


def test_pasted_objects_hide_what_is_below(monkeypatch):
    below = plain(0, [[0, 0, 40, 40], [60, 10, 80, 30], [50, 40, 60, 50]])
    above = plain(4, [[20, 0, 62, 50], [0, 50, 10, 60], [58, 10, 76, 31]])
    monkeypatch.setattr(torch, "rand", lambda *_: torch.tensor([0.1, 0.9, 0.2]))
    mixed = paste(below, above)
    truth = mixed.target
    # Of the second 2 of 20 columns hang over at the left, 4 show at the right; the third is hidden.
    assert truth.labels.tolist() == [0, 4, 4]
    assert truth.boxes.tolist() == [[0, 0, 20, 40], [20, 0, 62, 50], [58, 10, 76, 31]]
    assert truth.masks.int().sum((1, 2)).tolist() == [800, 42 * 50, 18 * 21]
    cover = truth.masks[1:].any(0)
    assert torch.equal(mixed.image, torch.where(cover, above.image, below.image))
    assert not (truth.masks[0] & cover).any()
    assert (truth.semantic[cover] == 4).all()
    assert torch.equal(truth.semantic[~cover], below.target.semantic[~cover])


def test_what_nothing_hides_keeps_its_box(monkeypatch):
    below, above = plain(0, [[0, 0, 40, 40]]), plain(4, [[50, 0, 62, 50]])
    below.target.boxes = torch.tensor([[0.25, 0.0, 39.5, 40.0]])  # as drawn, not as the mask
    monkeypatch.setattr(torch, "rand", lambda *_: torch.zeros(1))
    assert paste(below, above).target.boxes[0].tolist() == [0.25, 0.0, 39.5, 40.0]


def test_pasting_needs_masks():
    below = plain(0, [[0, 0, 40, 40]])
    below.target.masks = None
    with pytest.raises(DataError, match=r"^0\.png: has no masks.*option masks of the data set"):
        paste(below, below)


def test_images_without_objects_can_be_mixed():
    def empty() -> Sample:
        sample = plain(0, [])
        sample.target.semantic = None
        return sample

    policy = DetectionPolicy(size=48, mosaic=0.5, mixup=0.5, copy_paste=0.5)
    for seed in range(20):
        torch.manual_seed(seed)
        mixed = policy.compose(empty(), empty).target
        assert mixed.labels.shape == (0,) and mixed.labels.dtype == torch.long
        assert mixed.boxes.shape == (0, 4) and mixed.masks.shape == (0, 48, 48)


def test_crowds_of_all_images_are_dropped():
    boxes = [[4, 6, 30, 28]]
    policy = DetectionPolicy(size=64, mosaic=1.0, mixup=0.0)
    mixed = policy.compose(plain(0, boxes), lambda: plain(1, boxes, crowd=True))
    assert set(mixed.target.labels.tolist()) <= {0}


@pytest.mark.parametrize(
    ("options", "reads"),
    [({}, 1), ({"mosaic": 1.0}, 4), ({"mixup": 1.0}, 2), ({"mosaic": 1.0, "copy_paste": 1.0}, 5)],
)
def test_only_what_is_drawn_is_decoded(shapes_root, monkeypatch, options, reads):
    dataset = ShapesDataset(shapes_root, "train", task="instance", images=24, size=96)
    count, read = [0], ShapesDataset.__getitem__

    def counted(self: Dataset, index: int) -> Sample:
        count[0] += 1
        return read(self, index)

    monkeypatch.setattr(ShapesDataset, "__getitem__", counted)
    next(training_loader(dataset, DetectionPolicy(size=32, **options), 3, workers=0))
    assert count[0] == 3 * reads


def test_options_that_are_off_leave_the_random_numbers_alone():
    """So that a run of an older config stays the same."""
    policy = DetectionPolicy(size=40)
    torch.manual_seed(3)
    alone = policy.train(scene()[0])
    torch.manual_seed(3)
    composed = policy.compose(*scene())
    assert torch.equal(alone.image, composed.image)
    assert torch.equal(alone.target.boxes, composed.target.boxes)


def test_in_the_last_span_only_the_flip_is_left():
    strong = {"mosaic": 1.0, "mixup": 1.0, "zoom_out": 1.0, "photometric": 1.0, "copy_paste": 1.0}
    policy = DetectionPolicy(size=40, jitter=(0.2, 2), multi_scale=(0.5, 1.5), close=0.1, **strong)
    quiet = policy.for_batch(8, closing=True)
    found = set()
    for seed in range(12):
        torch.manual_seed(seed)
        sample = scene()[0]
        expected = policy.evaluate(sample).image
        image = quiet.compose(*scene()).image
        mirrored = torch.equal(image, expected.flip(2))
        assert mirrored or torch.equal(image, expected)
        found.add(mirrored)
    assert found == {True, False}
    assert policy.mosaic == 1.0 and policy.canvas == (40, 40)


def canvases(divisor: int, **options) -> set[tuple[int, int]]:
    policy = DetectionPolicy(**options)
    found = set()
    for seed in range(200):
        torch.manual_seed(seed)
        found.add(policy.for_batch(divisor, closing=False).canvas)
    return found


def test_canvases_are_those_of_rtdetr():
    sides = {side for side, _ in canvases(32, size=640, multi_scale=(0.75, 1.25))}
    assert sides == set(range(480, 801, 32))
    assert canvases(32, size=640) == {(640, 640)}


def test_canvases_keep_divisor_range_and_shape():
    for height, width in canvases(14, size=(280, 560), multi_scale=(0.5, 1.5)):
        assert height % 14 == 0 and width % 14 == 0
        assert 140 <= height <= 420 and abs(width - 2 * height) <= 14
    assert canvases(32, size=40, multi_scale=(0.1, 0.1)) == {(32, 32)}


def test_large_scale_jitter_is_that_of_torchvision():
    """ViTDet's: ScaleJitter, then a random crop, padded at the right and below."""
    canvas, places = (64, 64), []
    peer = v2.ScaleJitter(target_size=canvas, scale_range=(0.1, 2.0))
    policy = DetectionPolicy(
        size=canvas, resize="keep_ratio", jitter=(0.1, 2.0), flip=0, zoom_out=0, iou_crop=0
    )
    sample = plain(0, [[4, 6, 30, 28]])
    for seed in range(400):
        torch.manual_seed(seed)
        torch.rand(())  # ours: the chance of an IoU crop
        size = peer.make_params([sample.image])["size"]
        torch.manual_seed(seed)
        moved = policy._move(sample)
        assert moved.canvas == canvas and moved.at == (0, 0)
        for axis in (0, 1):
            assert abs(moved.content[axis] - min(size[axis], canvas[axis])) <= 1
            part = SIZE[axis] * min(1, canvas[axis] / size[axis])
            assert abs(moved.window[axis] - part) <= 2
        free = SIZE[1] - moved.window[1]
        assert 0 <= moved.corner[1] <= free
        places += [moved.corner[1] / free] if free > 9 else []
    assert min(places) < 0.05 and max(places) > 0.95  # the crop is drawn evenly
    assert sum(places) / len(places) == pytest.approx(0.5, abs=0.1)


def test_zooming_out_is_that_of_torchvision():
    """Share of the canvas and place of the image, before both are resized to one size."""
    torch.manual_seed(0)
    policy = DetectionPolicy(size=(240, 360), zoom_out=1.0, shrink=4.0, iou_crop=0, flip=0)
    sample = plain(0, [[4, 6, 30, 28]])
    moves = [policy._move(sample) for _ in range(600)]
    ours = torch.tensor(
        [[m.content[0] / 240, m.at[0] / 240, m.at[1] / 360, m.content[1] / 360] for m in moves]
    )
    peer = v2.RandomZoomOut(side_range=(1.0, 4.0), p=1.0)
    theirs = []
    for _ in range(600):
        left, top, right, bottom = peer.make_params([sample.image])["padding"]
        height, width = SIZE[0] + top + bottom, SIZE[1] + left + right
        theirs.append([SIZE[0] / height, top / height, left / width, SIZE[1] / width])
    for q in (0.1, 0.5, 0.9):
        torch.testing.assert_close(
            ours.quantile(q, 0), torch.tensor(theirs).quantile(q, 0), rtol=0, atol=0.05
        )


def test_wrong_options_say_their_name():
    with pytest.raises(ValueError, match="^shrink: must be at least 1"):
        DetectionPolicy(shrink=0.5)
    with pytest.raises(ValueError, match=r"^multi_scale: \[1.2, 0.8\]"):
        DetectionPolicy(multi_scale=(1.2, 0.8))
    with pytest.raises(ValueError, match=r"^mosaic_scale: "):
        DetectionPolicy(mosaic_scale=(0.0, 0.8))


def test_other_policies_are_the_same_for_every_batch():
    policy = SegmentationPolicy()
    assert policy.for_batch(32, closing=True) is policy
