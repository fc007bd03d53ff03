"""Pictures show what they were given."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitdense.ops.draw import _deepest, as_segments, draw, palette, side_by_side, stacked
from vitdense.ops.plates import Plates
from vitdense.structures import IGNORE, Prediction, Target

GREY = torch.full((3, 80, 120), 128, dtype=torch.uint8)
NAMES = ["cat", "dog"]


def changed(picture: torch.Tensor) -> torch.Tensor:
    return (picture != 128).any(0)


def test_boxes_are_drawn_in_their_colors_and_the_image_stays():
    before = GREY.clone()
    box = torch.tensor([[20.0, 30.0, 90.0, 70.0]])
    picture = draw(GREY, Target(torch.tensor([1]), box), NAMES)
    assert picture.dtype == torch.uint8 and picture.shape == GREY.shape
    assert torch.equal(GREY, before)
    color = torch.tensor(palette(2)[1], dtype=torch.uint8)
    for y, x in ((69, 50), (50, 20), (50, 89)):
        assert torch.equal(picture[:, y, x], color)
    assert not changed(picture)[40:60, 30:80].any()


def test_weak_predictions_are_left_out():
    answer = Prediction(
        scores=torch.tensor([0.9, 0.2]),
        labels=torch.tensor([0, 1]),
        boxes=torch.tensor([[5.0, 40.0, 30.0, 60.0], [70.0, 40.0, 110.0, 70.0]]),
    )
    assert not changed(draw(GREY, answer, NAMES))[:, 60:].any()
    assert changed(draw(GREY, answer, NAMES, threshold=0.1))[:, 60:].any()


@pytest.mark.parametrize("kind", ["masks", "panoptic"])
def test_masks_are_tinted(kind):
    mask = torch.zeros(80, 120, dtype=torch.bool)
    mask[30:60, 40:100] = True
    answer = Prediction(scores=torch.tensor([0.8]), labels=torch.tensor([0]))
    setattr(answer, kind, mask[None] if kind == "masks" else mask.long())
    picture = draw(GREY, answer, NAMES)
    assert changed(picture)[31:59, 41:99].all()
    assert not changed(picture)[62:].any()


def test_objects_of_one_class_are_told_apart():
    masks = torch.zeros(2, 80, 120, dtype=torch.bool)
    masks[0, 10:70, 5:55] = masks[1, 10:70, 65:115] = True
    target = Target(torch.tensor([0, 0]), torch.tensor([[5.0, 10, 55, 70]] * 2), masks)
    scored = Prediction(torch.tensor([0.9, 0.8]), target.labels, target.boxes, masks)
    for answer in (scored, as_segments(target)):
        picture = draw(GREY, answer, NAMES)
        assert (picture[:, 65, 10] != picture[:, 65, 110]).any()
        assert torch.equal(picture[:, 10, 20], torch.tensor(palette(1)[0], dtype=torch.uint8))
        assert changed(picture).sum() == masks.sum()  # no frames, and names inside


def test_the_best_object_has_the_color_of_its_class():
    masks = torch.ones(2, 80, 120, dtype=torch.bool)
    answer = Prediction(torch.tensor([0.9, 0.8]), torch.tensor([1, 1]), None, masks)
    corner = draw(GREY, answer, NAMES)[:, 0, 0]
    assert torch.equal(corner, torch.tensor(palette(2)[1], dtype=torch.uint8))


def test_segments_without_labels_or_pixels_are_left_alone():
    panoptic = torch.zeros(80, 120, dtype=torch.long)
    panoptic[:, :40] = 1
    answer = Prediction(torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), panoptic=panoptic)
    assert not changed(draw(GREY, answer, NAMES))[:, 40:].any()
    nothing = Target(torch.zeros(0, dtype=torch.long), None, torch.zeros(0, 80, 120).bool())
    assert torch.equal(draw(GREY, as_segments(nothing), NAMES), GREY)


def test_label_maps_are_tinted_and_ignored_pixels_are_not():
    semantic = torch.zeros(80, 120, dtype=torch.uint8)
    semantic[:, 60:] = IGNORE
    picture = draw(GREY, Target(semantic=semantic), NAMES)
    assert changed(picture)[:, :60].all() and not changed(picture)[:, 60:].any()


def test_large_regions_are_named_in_their_middle_and_thin_ones_too():
    region = np.zeros((2500, 3100), dtype=bool)
    region[200:2300, 400:2500] = True
    x, y, depth = _deepest(region)
    assert abs(x - 1450) <= 3 and abs(y - 1250) <= 3 and abs(depth - 1050) <= 3
    thin = np.zeros((2500, 3100), dtype=bool)
    thin[:, 1] = thin[1] = True  # of so large a region each third row and column are looked at
    x, y, depth = _deepest(thin)
    assert thin[y, x] and 0 < depth < 2
    assert _deepest(np.zeros((5, 5), dtype=bool)) == (0, 0, 0.0)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_scale_and_channels(channels):
    image = torch.zeros(channels, 20, 30, dtype=torch.uint8)
    mask = torch.ones(1, 20, 30, dtype=torch.bool)
    target = Target(torch.tensor([1]), torch.tensor([[1.0, 1, 9, 9]]), mask)
    assert draw(image, target, NAMES, scale=3).shape == (3, 60, 90)


def test_nothing_to_draw_is_the_image():
    answer = Prediction(torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.zeros(0, 4))
    assert torch.equal(draw(GREY, answer, NAMES), GREY)
    assert torch.equal(draw(GREY, Target(), NAMES), GREY)


def test_boxes_of_any_kind_do_not_fail():
    boxes = torch.tensor([[-5.0, -5, 500, 500], [10, 10, 10.2, 10.1], [118, 78, 120, 80]])
    picture = draw(GREY, Target(torch.tensor([0, 1, 0]), boxes), ["a" * 60, "b"])
    assert changed(picture).any()


def test_rows_and_columns():
    red, tall = torch.zeros(3, 10, 20, dtype=torch.uint8), torch.ones(3, 30, 5, dtype=torch.uint8)
    row = side_by_side(red, tall, gap=2)
    assert row.shape == (3, 30, 27)
    assert torch.equal(row[:, :10, :20], red) and torch.equal(row[:, :, 22:], tall)
    assert (row[:, 10:, :20] == 255).all()
    column = stacked(red, tall, gap=2)
    assert column.shape == (3, 42, 20)
    assert torch.equal(column[:, :10], red) and torch.equal(column[:, 12:, :5], tall)


def test_colors_differ():
    colors = torch.tensor(palette(20)).float()
    apart = torch.cdist(colors, colors) + 1000 * torch.eye(20)
    assert apart.min() > 40
    assert palette(3) == palette(20)[:3]


def test_accents_that_the_font_has_not_are_left_out():
    from PIL import Image, ImageDraw

    shown = []
    for name in ("Blutplättchen", "Blutpla\u0308ttchen", "Blutplattchen"):
        picture = Image.new("RGB", (200, 40))
        plates = Plates(ImageDraw.Draw(picture))
        plates.add(name, 0, 30, (255, 0, 0))
        plates.write()
        shown.append(picture.tobytes())
    assert shown[0] == shown[1] == shown[2]


def test_plates_make_room_for_one_another():
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (200, 120))
    plates = Plates(ImageDraw.Draw(picture))
    for text in ("a star", "a star", "a star"):
        plates.add(text, 80, 60, (255, 0, 0))
    plates.add("on the edge", 190, 0, (0, 255, 0), centered=True)
    cover = torch.zeros(120, 200)
    for _, (x, y, right, bottom), _ in plates.names:
        assert 0 <= x < right <= 200 and 0 <= y < bottom <= 120
        cover[y:bottom, x:right] += 1
    assert cover.max() == 1
    for _ in range(9):  # more than there is room for
        plates.add("a star", 80, 60, (0, 0, 255))
    assert plates.names[-1][1] == plates.names[0][1]
    plates.write()
    shown = torch.from_numpy(np.array(picture))
    x, y, right, bottom = plates.names[0][1]
    assert torch.equal(
        shown[y, x], torch.tensor([255, 0, 0], dtype=torch.uint8)
    )  # the first lies on top
