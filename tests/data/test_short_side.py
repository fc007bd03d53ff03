"""DETR's preparation: the size of transformers' image processor, the contract of a policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vitdense.data.short_side import ShortSidePolicy
from vitdense.structures import Sample, Target
from vitdense.testing import check_policy


def sample(height: int, width: int) -> Sample:
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    return Sample(image, Target(), 1, (height, width), Path("a.png"))


@pytest.mark.parametrize("channels", [1, 3])
def test_keeps_the_contract(channels: int) -> None:
    check_policy(ShortSidePolicy, channels=channels, size=48, longest=80, photometric=1.0)


@pytest.mark.parametrize("size", [(60, 80), (80, 60), (50, 50), (20, 90), (33, 100)])
def test_sizes_are_those_of_transformers(size: tuple[int, int]) -> None:
    detr = pytest.importorskip("transformers.models.detr.image_processing_pil_detr")
    processor = detr.DetrImageProcessorPil(size={"shortest_edge": 48, "longest_edge": 80})
    prepared = sample(*size)
    expected = processor(prepared.image.permute(1, 2, 0).numpy(), return_tensors="pt")
    ours = ShortSidePolicy(size=48, longest=80).evaluate(prepared).image
    theirs = expected["pixel_values"].shape
    assert abs(ours.shape[1] - theirs[2]) <= 1 and abs(ours.shape[2] - theirs[3]) <= 1


def test_training_draws_sizes_within_the_scale() -> None:
    policy = ShortSidePolicy(size=40, longest=100, scale=(0.5, 1.0), iou_crop=0.0)
    torch.manual_seed(0)
    sides = {min(policy.train(sample(80, 120)).image.shape[1:]) for _ in range(30)}
    assert min(sides) >= 20 and max(sides) <= 40 and len(sides) > 5


@pytest.mark.parametrize(
    "options, message",
    [({"size": 90, "longest": 80}, "longest: "), ({"scale": (2.0, 1.0)}, "scale: ")],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShortSidePolicy(**options)
