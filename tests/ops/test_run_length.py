"""Run lengths equal pycocotools', byte by byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from vitdense.ops import run_length
from vitdense.ops.run_length import chunks, encode, from_counts, from_strings, join, spread

coco = pytest.importorskip("pycocotools.mask")

SHAPES = [(5, 7, 9), (3, 1, 1), (4, 1, 17), (4, 13, 1), (6, 16, 16), (10, 33, 64), (1, 300, 200)]


def reference(masks: Tensor) -> list[dict]:
    return [coco.encode(np.asfortranarray(mask.numpy(), dtype=np.uint8)) for mask in masks]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_encoding_equals_pycocotools(shape: tuple[int, int, int], density: float) -> None:
    masks = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density
    runs, theirs = encode(masks), reference(masks)
    assert runs.strings() == [rle["counts"].decode() for rle in theirs]
    assert runs.areas().tolist() == [coco.area(rle) for rle in theirs]
    boxes = runs.boxes()
    boxes[:, 2:] -= boxes[:, :2]
    assert boxes.tolist() == [coco.toBbox(rle).tolist() for rle in theirs]
    back = from_strings(runs.strings(), [shape[1:]] * shape[0])
    for name in ("edges", "starts", "sizes"):
        assert torch.equal(getattr(back, name), getattr(runs, name)), name


def test_views_of_larger_tensors() -> None:
    """Words are read at any offset and stride."""
    masks = torch.rand(4, 21, 40, generator=torch.Generator().manual_seed(1)) < 0.3
    for view in (masks[1:, 3:, 5:29], masks[:, ::2], masks.transpose(1, 2), masks.flatten()[3:][
        :800].view(2, 10, 40), masks.int()):  # fmt: skip
        expected = [rle["counts"].decode() for rle in reference(view.bool())]
        assert encode(view).strings() == expected


def test_select_and_join() -> None:
    generator = torch.Generator().manual_seed(2)
    small = encode(torch.rand(3, 5, 6, generator=generator) < 0.4)
    large = encode(torch.rand(2, 50, 60, generator=generator) < 0.4)
    both = join([small, large, small.select(torch.tensor([2, 2]))])
    texts = small.strings() + large.strings() + small.strings()[2:] * 2
    assert both.strings() == texts and len(both) == 7
    assert both.select(torch.tensor([3, 0])).strings() == [texts[3], texts[0]]
    assert both.sizes[3].tolist() == [50, 60]


def test_nothing() -> None:
    none = encode(torch.zeros(0, 4, 5, dtype=torch.bool))
    assert len(none) == 0 and none.strings() == [] and none.boxes().shape == (0, 4)
    assert len(from_strings([], [])) == 0
    assert encode(torch.zeros(2, 0, 5)).areas().tolist() == [0, 0]


def test_runs_of_no_length_are_read() -> None:
    """Other programs write them: 2 off, 3 on, 0 off, 2 on, 3 off."""
    runs = from_counts(torch.tensor([2, 3, 0, 2, 3]), torch.tensor([0, 5]), torch.tensor([[5, 2]]))
    assert runs.areas().tolist() == [5]
    text = coco.frPyObjects({"size": [5, 2], "counts": [2, 3, 0, 2, 3]}, 5, 2)["counts"]
    assert from_strings([text], [(5, 2)]).edges.tolist() == [2, 5, 5, 7]


@pytest.mark.parametrize("text", ["", "\n", "o", "5" * 3 + "~~"])
def test_what_is_no_rle_is_named(text: str) -> None:
    right = encode(torch.ones(1, 3, 4)).strings()[0]
    with pytest.raises(ValueError, match="RLE number 1 "):
        from_strings([right, text, right], [(3, 4)] * 3)


def test_runs_that_do_not_cover_their_image_are_named() -> None:
    right = encode(torch.ones(1, 3, 4)).strings()[0]
    with pytest.raises(ValueError, match=r"RLE number 1 does not cover .* \[3, 5\] pixels"):
        from_strings([right, right], [(3, 4), (3, 5)])
    with pytest.raises(ValueError, match="RLE number 0 does not cover"):
        from_counts(torch.tensor([-2, 14]), torch.tensor([0, 2]), torch.tensor([[3, 4]]))


def test_parts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = torch.rand(9, 8, 8, generator=torch.Generator().manual_seed(3)) < 0.5
    whole = encode(masks)
    expected = whole.areas(), whole.boxes()
    texts = whole.strings()
    monkeypatch.setattr(run_length, "MOST_EDGES", 40)
    assert len(whole.parts()) > 3
    assert torch.equal(whole.areas(), expected[0]) and torch.equal(whole.boxes(), expected[1])
    assert whole.strings() == texts and len(texts) == 9


def test_chunks_and_spread() -> None:
    assert chunks(torch.tensor([3, 0, 4, 9, 1]), 5) == [slice(0, 2), slice(2, 3), slice(3, 5)]
    assert chunks(torch.zeros(0).long(), 5) == []
    assert chunks(torch.tensor([0, 0]), 5) == [slice(0, 2)]
    assert spread(torch.tensor([5, 0, 9]), torch.tensor([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
