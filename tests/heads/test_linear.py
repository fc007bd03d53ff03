"""The linear head equals one linear classifier on the concatenated maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitdense.heads.segmentation.base import SemanticOutputs
from vitdense.heads.segmentation.linear import LinearHead
from vitdense.structures import IGNORE, Level, Target

LEVELS = [Level(6, 4), Level(10, 8), Level(14, 16)]
PLAIN = [Level(12, 14)] * 4


def maps_of(levels: list[Level], height: int = 112, width: int = 224) -> list[Tensor]:
    return [
        torch.randn(2, level.channels, int(height // level.stride), int(width // level.stride))
        for level in levels
    ]


@pytest.mark.parametrize("norm", ["auto", "none"])
def test_equals_a_classifier_on_the_concatenated_maps(norm: str) -> None:
    head = LinearHead(LEVELS, 5, norm=norm).double().eval()
    maps = [map_.double() for map_ in maps_of(LEVELS)]
    for batch_norm in head.norms:
        if isinstance(batch_norm, nn.BatchNorm2d):
            for tensor in batch_norm.state_dict().values():
                if tensor.is_floating_point():
                    nn.init.uniform_(tensor, 0.5, 1.5)
    size = maps[0].shape[-2:]
    resized = [
        F.interpolate(norm_(map_), size, mode="bilinear", align_corners=False)
        for norm_, map_ in zip(head.norms, maps, strict=True)
    ]
    weight = torch.cat([classifier[1].weight for classifier in head.classifiers], dim=1)
    expected = F.conv2d(torch.cat(resized, dim=1), weight, head.classifiers[0][1].bias)
    assert torch.allclose(head(maps).logits, expected, atol=1e-12)


def test_only_the_last_map_is_read() -> None:
    head = LinearHead(PLAIN, 5, maps="last").eval()
    maps = maps_of(PLAIN)
    logits = head(maps).logits
    assert logits.shape == (2, 5, 8, 16)
    assert torch.equal(
        logits, head([torch.full_like(m, torch.nan) for m in maps[:3]] + maps[3:]).logits
    )
    assert sum(p.numel() for p in head.parameters()) == 12 * 2 + 12 * 5 + 5


@pytest.mark.parametrize("norm", ["auto", "batch", "sync", "group", "layer", "none"])
def test_one_pixel_of_one_image_trains(norm: str) -> None:
    head = LinearHead([Level(16, 16)], 5, norm=norm)
    outputs = head([torch.randn(1, 16, 1, 1)])
    assert isinstance(outputs, SemanticOutputs)
    assert type(outputs) is type(head.eval()([torch.randn(1, 16, 1, 1)]))
    target = Target(semantic=torch.zeros(16, 16, dtype=torch.uint8))
    sum(head.loss(outputs, [target]).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_norm_makes_the_scale_of_features_irrelevant() -> None:
    torch.manual_seed(0)
    head = LinearHead(PLAIN, 5, dropout=0.0)
    maps = maps_of(PLAIN)
    scaled = [map_ * 100 + 7 for map_ in maps]
    assert torch.allclose(head(maps).logits, head(scaled).logits, atol=1e-4)


def test_initial_weights_are_small() -> None:
    head = LinearHead([Level(512, 16)], 150)
    conv = head.classifiers[0][1]
    assert conv.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not conv.bias.any()


def test_loss_options_reach_the_loss() -> None:
    maps = maps_of(LEVELS)
    targets = [Target(semantic=torch.randint(5, (112, 224))) for _ in maps[0]]
    targets[0].semantic[:50] = IGNORE
    head = LinearHead(
        LEVELS,
        5,
        losses={"dice": 2.0, "cross_entropy": 0.5},
        class_weights=[1.0, 2.0, 3.0, 4.0, 5.0],
        label_smoothing=0.1,
    ).eval()
    outputs = head(maps)
    terms = head.loss(outputs, targets)
    logits = F.interpolate(outputs.logits, (112, 224), mode="bilinear", align_corners=False)
    labels = torch.stack([target.semantic for target in targets])
    expected = F.cross_entropy(
        logits, labels, torch.arange(1.0, 6.0), ignore_index=IGNORE, label_smoothing=0.1
    )
    assert list(terms) == ["dice", "cross_entropy"]
    assert torch.allclose(terms["cross_entropy"], 0.5 * expected)
    assert 0 < terms["dice"] < 2
