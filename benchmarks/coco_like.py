"""Generated sets like COCO's validation split: objects, their masks, and panoptic maps.

Classes: 30 % are of the first ("person"), the others fall off to 1 in 5,000, and an image has few
of them. 7.2 objects an image, some images none and some 40; 40 % of them small, 20 % large.
Detections, 100 an image: 2 to 4 near each object, 1 in 5 of a wrong class, the others far.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitdense.structures import Batch, Frame, Prediction, Target

CLASSES, PER_IMAGE, FOUND = 80, 7.2, 100
SIZE = (480, 640)
SEGMENTS = 11
"""Of a panoptic map, as COCO's have on average."""

Image = tuple[Prediction, Target]
Maps = tuple[Tensor, Tensor, Tensor, Tensor]
"""Panoptic numbers int32 [H, W] of truth and answer, and the classes of their segments."""


def popularity() -> Tensor:
    """Of each class, its part of all objects."""
    rest = torch.exp(-torch.arange(CLASSES - 1) / 14.0)
    return torch.cat([torch.tensor([0.3]), 0.7 * rest / rest.sum()])


def objects(images: int, seed: int = 0) -> list[Image]:
    """Detections and truth of each image, boxes in float32."""
    generator = torch.Generator().manual_seed(seed)
    return [_image(generator, popularity()) for _ in range(images)]


def _image(generator: torch.Generator, weights: Tensor) -> Image:
    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator)

    count = min(int(torch.empty(1).exponential_(1 / (PER_IMAGE + 0.5), generator=generator)), 60)
    here = weights.multinomial(int(1 + 4 * uniform(1)), generator=generator)
    labels = here[torch.randint(len(here), (count,), generator=generator)]
    boxes = _boxes(count, generator)
    times = torch.randint(2, 5, (count,), generator=generator)
    near = torch.arange(count).repeat_interleave(times)[: FOUND - 10]
    sides = (boxes[:, 2:] - boxes[:, :2])[near].repeat(1, 2)
    moved = boxes[near] + 0.06 * torch.randn(len(near), 4, generator=generator) * sides
    moved[:, 2:] = torch.maximum(moved[:, 2:], moved[:, :2] + 1)
    guess = weights.multinomial(FOUND, replacement=True, generator=generator)
    known = uniform(len(near)) < 0.8
    guess[: len(near)] = torch.where(known, labels[near], guess[: len(near)])
    scores = uniform(FOUND) ** 2
    scores[: len(near)] = uniform(len(near)) ** 0.5
    found = torch.cat([moved, _boxes(FOUND - len(near), generator)])
    crowd = uniform(count) < 0.01
    area = 0.6 * (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return Prediction(scores, guess, found), Target(labels, boxes, crowd=crowd, area=area)


def _boxes(count: int, generator: torch.Generator) -> Tensor:
    size = torch.randn(count, 1, generator=generator)
    shape = 0.3 * torch.randn(count, 1, generator=generator)
    sides = torch.exp(3.9 + size + torch.cat([shape, -shape], 1)).clamp(4, 460)
    space = torch.tensor(SIZE[::-1]) - sides
    corner = torch.rand(count, 2, generator=generator) * space
    return torch.cat([corner, corner + sides], 1)


def batches(images: list[Image], size: int = 16) -> Iterator[tuple[list[Prediction], Batch]]:
    """Predictions with the batches that they are of, as an evaluation meets them."""
    for first in range(0, len(images), size):
        predictions, targets = map(list, zip(*images[first : first + size], strict=True))
        ids: list[int | str] = list(range(first, first + len(targets)))
        frames, paths = [Frame(SIZE, SIZE, SIZE)] * len(ids), [Path("image.jpg")] * len(ids)
        yield predictions, Batch(torch.zeros(len(ids), 3, 1, 1), targets, frames, ids, paths)


def draw(boxes: Tensor) -> Tensor:
    """Bool masks [N, H, W] of wavy ellipses in the boxes."""
    y = torch.arange(SIZE[0])[:, None] + 0.5
    x = torch.arange(SIZE[1])[None] + 0.5
    left, top, right, bottom = (value[:, None, None] for value in boxes.unbind(1))
    across = (2 * (x - left) / (right - left) - 1).square()
    down = (2 * (y - top) / (bottom - top) - 1).square()
    return across + down < 0.9 + 0.1 * torch.sin(x / 3) * torch.cos(y / 4)


def panoptic(images: int, seed: int = 0) -> list[Maps]:
    """Maps of smooth regions; the answer is the truth, moved and partly of other regions."""
    generator = torch.Generator().manual_seed(seed)
    return [_maps(generator) for _ in range(images)]


def _maps(generator: torch.Generator) -> Maps:
    coarse = torch.randn(1, SEGMENTS, 6, 8, generator=generator)
    noise = torch.randn(1, SEGMENTS, 6, 8, generator=generator)
    truth, answer = (
        F.interpolate(some, SIZE, mode="bicubic")[0].argmax(0).int()
        for some in (coarse, coarse + 0.3 * noise)
    )
    truth, answer = truth + 1, answer.roll(2, 1) + 1
    truth[:20] = 0  # void
    parts = []
    for numbers in (truth, answer):
        ids, places = numbers.unique(return_inverse=True)
        parts.append((places + int(ids[0] > 0)).int())
    # The classes go with the regions, so that most of them match.
    kinds = torch.randint(CLASSES, (SEGMENTS + 1,), generator=generator)
    labels = [kinds[ids[ids > 0]] for ids in (truth.unique(), answer.unique())]
    return parts[0], parts[1], labels[0], labels[1]


def colors(numbers: Tensor, factor: int = 5001) -> np.ndarray:
    """uint8 [H, W, 3] of ids that are `factor` times the numbers, as in panoptic PNG files."""
    ids = numbers.numpy() * factor
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], 2).astype(np.uint8)


def semantic(images: int, classes: int = 150, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Label maps of truth and answer, uint8 [H, W], with 255 where nothing counts."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for truth, answer, *_ in panoptic(images, seed):
        kinds = torch.randint(classes, (SEGMENTS + 1,), generator=generator).to(torch.uint8)
        labels = kinds[truth.long()].masked_fill(truth == 0, 255)
        found.append((labels, kinds[answer.long()]))
    return found
