"""Policies: image and truth stay together, and evaluation leaves the truth alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from vitdense.data import transforms
from vitdense.data.color import distort
from vitdense.data.crop import is_varied, window_around_objects, window_to_canvas
from vitdense.data.geometry import Movement, select
from vitdense.data.shapes import ShapesDataset
from vitdense.data.transforms import DetectionPolicy, NoPolicy, SegmentationPolicy
from vitdense.ops.masks import masks_to_boxes
from vitdense.structures import IGNORE, Sample, Target
from vitdense.testing import check_policy

STRONG = {"iou_crop": 0.7, "zoom_out": 0.5, "jitter": (0.4, 2.0), "flip": 0.5}


def objects_sample(height: int = 60, width: int = 90) -> Sample:
    """Four rectangles, each of its own color, with boxes, masks and semantic labels."""
    boxes = torch.tensor([[5, 5, 30, 25], [40, 10, 68, 50], [2, 35, 20, 58], [70, 2, 88, 12]])
    masks = torch.zeros(4, height, width, dtype=torch.bool)
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    semantic = torch.full((height, width), 4, dtype=torch.uint8)
    for index, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        masks[index, y1:y2, x1:x2] = True
        image[:, y1:y2, x1:x2] = 60 * (index + 1)
        semantic[y1:y2, x1:x2] = index
    target = Target(torch.arange(4), boxes.float(), masks, semantic)
    return Sample(image, target, 1, (height, width), Path("a.png"))


@pytest.mark.parametrize(
    "options",
    [
        {"size": 64},
        {"size": (48, 80), "resize": "keep_ratio", **STRONG},
        {"size": 32, "photometric": 1.0, "flip": 1.0},
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_detection_keeps_the_contract(options, channels):
    check_policy(DetectionPolicy, channels=channels, **options)


@pytest.mark.parametrize("evaluation", ["short_side", "stretch", "keep"])
def test_segmentation_keeps_the_contract(evaluation):
    check_policy(SegmentationPolicy, size=48, crop=(40, 56), evaluation=evaluation)


def test_none_keeps_the_contract():
    check_policy(NoPolicy)


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 2**31), keep=st.booleans())
def test_boxes_labels_masks_and_pixels_stay_together(seed, keep):
    torch.manual_seed(seed)
    options = {"resize": "keep_ratio"} if keep else {}
    policy = DetectionPolicy(size=(72, 64), photometric=0, **STRONG, **options)
    moved = policy.train(objects_sample())
    target = moved.target
    assert moved.image.shape == (3, 72, 64)
    assert target.area is None and target.crowd is None
    assert len(target.labels) == len(target.boxes) == len(target.masks)
    hug = masks_to_boxes(target.masks)
    assert (target.boxes - hug).abs().max().item() <= 2 if len(hug) else True
    for label, mask in zip(target.labels.tolist(), target.masks, strict=True):
        core = ~torch.nn.functional.max_pool2d((~mask)[None, None].float(), 9, 1, 4)[0, 0].bool()
        assert (moved.image[0][core] == 60 * (label + 1)).all()
        assert (target.semantic[mask] == label).all()
    assert ((target.semantic == IGNORE) <= (moved.image[0] == 0)).all()


def test_boxes_hug_masks_of_generated_scenes(shapes_root):
    dataset = ShapesDataset(shapes_root, "train", task="instance", images=24, size=96)
    policy = DetectionPolicy(size=80, **STRONG)
    checked = 0
    for seed in range(150):
        torch.manual_seed(seed)
        target = policy.train(dataset[seed % len(dataset)]).target
        checked += len(target.boxes)
        assert ((target.boxes - masks_to_boxes(target.masks)).abs() <= 2).all()
    assert checked > 200


def test_a_plain_movement_equals_torchvisions_crop_resize_flip():
    sample = objects_sample()
    moved = Movement((3, 4), (50, 80), (25, 40), (32, 48), (2, 5), mirror=True)(sample)
    expected = functional.resized_crop(sample.image, 3, 4, 50, 80, [25, 40], antialias=True)
    expected = functional.pad(functional.horizontal_flip(expected), [5, 2, 3, 5])
    assert torch.equal(moved.image, expected)
    # less (4, 3) is [36, 7, 64, 47]; then halved, mirrored in 40, moved by (5, 2)
    at = moved.target.labels.tolist().index(1)
    assert moved.target.boxes[at].tolist() == pytest.approx([13, 5.5, 27, 25.5], abs=1)


def test_without_masks_boxes_move_exactly():
    sample = objects_sample()
    sample.target.masks = None
    moved = Movement((0, 0), (60, 90), (90, 60), (90, 60), mirror=True)(sample)
    x1, y1, x2, y2 = sample.target.boxes.unbind(1)
    expected = torch.stack([60 - x2 / 1.5, y1 * 1.5, 60 - x1 / 1.5, y2 * 1.5], 1)
    torch.testing.assert_close(moved.target.boxes, expected)


def test_crowds_and_slivers_leave_every_field():
    sample = objects_sample()
    sample.target.crowd = torch.tensor([False, True, False, False])
    sample.target.area = torch.ones(4)
    sample.target.masks = None
    moved = Movement((0, 0), (60, 75), (60, 75), (60, 75))(sample)  # 5 of 18 columns of object 3
    assert moved.target.labels.tolist() == [0, 2, 3]
    moved = Movement((0, 0), (60, 74), (60, 74), (60, 74))(sample)  # 4 of 18: less than a quarter
    assert moved.target.labels.tolist() == [0, 2]
    assert len(moved.target.boxes) == 2


def test_objects_with_masks_stay_while_a_pixel_of_them_is_seen():
    sample = objects_sample()
    sample.target.crowd = torch.tensor([False, True, False, False])
    moved = Movement((0, 0), (60, 71), (60, 71), (60, 71))(sample)  # 1 of 18 columns of object 3
    assert moved.target.labels.tolist() == [0, 2, 3]
    assert moved.target.boxes[2].tolist() == [70, 2, 71, 12]
    assert len(moved.target.masks) == 3 and moved.target.masks.flatten(1).any(1).all()
    moved = Movement((0, 0), (60, 70), (60, 70), (60, 70))(sample)
    assert moved.target.labels.tolist() == [0, 2]


def test_objects_smaller_than_a_pixel_are_dropped():
    sample = objects_sample()
    sample.target.masks = None
    moved = Movement((0, 0), (60, 90), (4, 6), (4, 6))(sample)
    assert moved.target.labels.tolist() == [0, 1, 2]
    moved = Movement((0, 0), (60, 90), (2, 3), (2, 3))(objects_sample())
    kept = moved.target
    assert len(kept.labels) == len(kept.boxes) == len(kept.masks) < 4
    assert kept.masks.flatten(1).any(1).all()


def test_evaluation_resizes_the_image_alone():
    sample = objects_sample()
    found = DetectionPolicy(size=(30, 30)).evaluate(sample)
    assert found.image.shape == (3, 30, 30) and found.target is sample.target
    found = DetectionPolicy(size=(60, 60), resize="keep_ratio").evaluate(sample)
    assert found.image.shape == (3, 40, 60)
    assert DetectionPolicy(size=(60, 60), resize="keep_ratio").canvas == (60, 60)
    segmentation = SegmentationPolicy(size=30, crop=16)
    assert segmentation.evaluate(sample).image.shape == (3, 30, 45)
    assert segmentation.canvas is None
    stretch = SegmentationPolicy(crop=(16, 24), evaluation="stretch")
    assert stretch.evaluate(sample).image.shape == (3, *stretch.canvas)


def test_segmentation_crops_at_random_scales_and_pads_with_ignored_pixels():
    policy = SegmentationPolicy(size=60, crop=(50, 100), scale=(0.5, 2.0), photometric=0)
    padded = 0
    for seed in range(30):
        torch.manual_seed(seed)
        moved = policy.train(objects_sample())
        assert moved.image.shape == (3, 50, 100) and moved.target.semantic.shape == (50, 100)
        padding = moved.target.semantic == IGNORE
        assert not moved.image[:, padding].any()
        padded += bool(padding.any())
    assert 0 < padded < 30


def test_crops_full_of_one_class_are_drawn_again():
    semantic = torch.zeros(100, 100, dtype=torch.uint8)
    semantic[:, 60:] = 1
    assert is_varied(semantic, ((0, 40), (40, 40)), 0.75)
    assert not is_varied(semantic, ((0, 0), (40, 40)), 0.75)
    semantic[:, :60] = IGNORE
    assert not is_varied(semantic, ((0, 0), (100, 100)), 0.75)
    assert not is_varied(semantic, ((0, 0), (20, 20)), 0.75)


@pytest.mark.parametrize(("most", "draws"), [(1.0, 1), (0.99, 10)])
def test_a_ratio_of_1_lets_crops_of_one_class_be(most, draws, monkeypatch):
    drawn = []

    def draw(*args):
        drawn.append(args)
        return window_to_canvas(*args)

    monkeypatch.setattr(transforms, "window_to_canvas", draw)
    sample = objects_sample()
    sample.target.semantic = torch.zeros_like(sample.target.semantic)
    SegmentationPolicy(size=60, crop=16, cat_max_ratio=most).train(sample)
    assert len(drawn) == draws


def test_windows_around_objects_are_those_of_torchvision_in_distribution():
    from torchvision import tv_tensors

    boxes, size = torch.tensor([[10.0, 10, 50, 40], [60, 50, 90, 70]]), (80, 120)
    torch.manual_seed(0)
    ours = [window_around_objects(boxes, size)[1] for _ in range(400)]
    peer = v2.RandomIoUCrop()
    inputs = [
        tv_tensors.Image(torch.zeros(3, *size)),
        tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
    ]
    found = [peer.make_params(inputs) for _ in range(400)]
    theirs = [(it["height"], it["width"]) if it else size for it in found]
    ours, theirs = torch.tensor(ours).float(), torch.tensor(theirs).float()
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=3.5, rtol=0)
    torch.testing.assert_close(ours.std(0), theirs.std(0), atol=3, rtol=0)


def test_an_image_without_objects_has_no_window_to_find():
    assert window_around_objects(torch.zeros(0, 4), (30, 40)) == ((0, 0), (30, 40))


def test_colors_change_as_torchvision_changes_them(monkeypatch):
    image = torch.randint(40, 200, (3, 20, 30), dtype=torch.uint8)
    for part, function in enumerate(
        (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    ):
        draws = iter([torch.tensor([float(part != it) for it in range(4)]), torch.full((4,), 0.9)])
        monkeypatch.setattr(torch, "rand", lambda *_, draws=draws: next(draws))
        found = distort(image, 0.5)
        expected = function(image, 1 + 0.8 * (0.125, 0.5, 0.5)[part])
        assert (found.int() - expected.int()).abs().max() <= 2


def test_hue_keeps_luma_and_grey():
    torch.manual_seed(0)
    grey = torch.randint(60, 180, (1, 20, 30), dtype=torch.uint8).expand(3, -1, -1)
    same = torch.eye(3)
    from vitdense.data import color

    turned = color._turned(0.0, 0.05)
    assert not torch.allclose(turned, same, atol=0.05)
    torch.testing.assert_close(turned @ torch.ones(3), torch.ones(3), atol=2e-3, rtol=0)
    luma = torch.tensor([0.299, 0.587, 0.114])
    torch.testing.assert_close(luma @ turned, luma, atol=1e-4, rtol=0)
    assert distort(grey, 1.0).dtype == torch.uint8
    assert torch.equal(distort(grey, 0.0), grey)


def test_wrong_ranges_name_the_option():
    with pytest.raises(ValueError, match=r"^jitter: \[2.0, 0.5\] must be \[lowest, highest\]"):
        DetectionPolicy(jitter=(2.0, 0.5))
    with pytest.raises(ValueError, match="^scale: "):
        SegmentationPolicy(scale=(0.0, 1.0))


def test_select_leaves_pixels_alone():
    target = select(objects_sample().target, torch.tensor([True, False, False, True]))
    assert target.labels.tolist() == [0, 3]
    assert target.masks.shape[0] == 2 and target.semantic.shape == (60, 90)


@pytest.mark.parametrize("mirror", [False, True])
def test_masks_that_do_not_overlap_move_as_the_others_do(mirror):
    """They go as one map of their numbers; a doubled mask makes them overlap."""
    move = Movement((3, 4), (50, 80), (70, 61), (80, 64), (2, 1), mirror)
    apart, together = objects_sample(), objects_sample()
    truth, places = together.target, [0, 1, 2, 3, 3]
    together.target = Target(truth.labels[places], truth.boxes[places], truth.masks[places])
    first, second = move(apart).target, move(together).target
    assert len(first.masks) == 4
    assert torch.equal(first.masks, second.masks[:4]) and torch.equal(first.boxes, second.boxes[:4])


def test_more_masks_than_numbers():
    masks = torch.eye(400, dtype=torch.bool)[:300].view(300, 20, 20)
    image, labels = torch.zeros(3, 20, 20, dtype=torch.uint8), torch.arange(300)
    sample = Sample(image, Target(labels, masks=masks), 1, (20, 20), Path("a.png"))
    moved = Movement((0, 0), (20, 20), (20, 20), (20, 20), mirror=True)(sample).target
    assert torch.equal(moved.masks, masks.flip(2)) and torch.equal(moved.labels, labels)
