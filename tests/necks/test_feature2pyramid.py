"""The neck of BEiT and MAE equals transformers'."""

from __future__ import annotations

import math

import pytest
import torch

from vitdense.necks.feature2pyramid import Feature2Pyramid
from vitdense.structures import Level

PLAIN = [Level(12, 16)] * 4


def test_equals_transformers() -> None:
    from transformers import BeitConfig, BeitForSemanticSegmentation

    torch.manual_seed(0)
    config = BeitConfig(
        image_size=64,
        hidden_size=12,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=12,
        out_indices=[1, 2, 3, 4],
        num_labels=3,
    )
    theirs = BeitForSemanticSegmentation(config).fpn
    ours = Feature2Pyramid(PLAIN)
    names = ours.state_dict().keys()  # in the order of the layers, as theirs
    ours.load_state_dict(dict(zip(names, theirs.state_dict().values(), strict=True)))
    maps = [torch.randn(2, 12, 4, 6) for _ in PLAIN]
    for training in (True, False):
        expected = theirs.train(training)(maps)
        for found, map_ in zip(ours.train(training)(maps), expected, strict=True):
            assert torch.allclose(found, map_, atol=1e-6)


@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize("grid", [(4, 4), (7, 5)])
def test_levels_are_what_comes_out(patch: int, grid: tuple[int, int]) -> None:
    neck = Feature2Pyramid([Level(12, patch)] * 5, scales=(4.0, 2.0, 1.0, 0.5, 0.25))
    maps = neck([torch.zeros(2, 12, *grid)] * 5)
    assert [level.stride for level in neck.levels] == [patch * s for s in (0.25, 0.5, 1, 2, 4)]
    assert [tuple(m.shape) for m in maps] == [
        (2, 12, *(math.ceil(side * patch / level.stride) for side in grid)) for level in neck.levels
    ]


def test_each_level_reads_its_own_map() -> None:
    neck = Feature2Pyramid(PLAIN).eval()
    maps = [torch.randn(1, 12, 4, 4) for _ in PLAIN]
    before = neck(maps)
    for index in range(4):
        changed = [m + (place == index) for place, m in enumerate(maps)]
        same = [torch.equal(a, b) for a, b in zip(before, neck(changed), strict=True)]
        assert same == [place != index for place in range(4)]


@pytest.mark.parametrize(
    ("levels", "scales", "match"),
    [
        (PLAIN, (3.0, 2.0, 1.0, 0.5), "^scales: .* must be of"),
        (PLAIN[:1], (4.0, 2.0, 1.0, 0.5), "^scales: there are 4 of them for 1 maps"),
        (PLAIN, (0.5, 1.0, 2.0, 4.0), "^scales: .* must not get finer"),
    ],
)
def test_scales_that_make_no_pyramid_are_refused(levels, scales, match) -> None:
    with pytest.raises(ValueError, match=match):
        Feature2Pyramid(levels, scales=scales)
