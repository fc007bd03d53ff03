"""Runs of two maps, by loops; and sorting of scores, which decides between equal ones."""

from __future__ import annotations

import math

import pytest
import torch

from vitdense.metrics.objects import by_score
from vitdense.ops.histogram import joint_histogram
from vitdense.ops.panoptic import common_runs


def runs_of(first: torch.Tensor, second: torch.Tensor) -> list[tuple[int, int]]:
    pixels = [(a.tolist(), b.tolist()) for a, b in zip(first, second, strict=True)]
    starts = [k for k, its in enumerate(pixels) if k == 0 or its != pixels[k - 1]]
    ends = [*starts[1:], len(pixels)] if pixels else []
    return [(start, end - start) for start, end in zip(starts, ends, strict=True)]


@pytest.mark.parametrize("size", [(0, 5), (1, 1), (1, 9), (3, 7), (8, 16), (13, 21)])
@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_runs_of_maps(size: tuple[int, int], kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size[1])
    maps = [torch.randint(0, 2, size, generator=generator).to(kind) * 77 for _ in range(2)]
    starts, lengths = common_runs(*maps)
    found = list(zip(starts.tolist(), lengths.tolist(), strict=True))
    assert found == runs_of(*(some.flatten() for some in maps))


def test_runs_of_colors_in_any_layout() -> None:
    generator = torch.Generator().manual_seed(0)
    planes = [torch.randint(0, 2, (3, 6, 11), generator=generator).byte() for _ in range(2)]
    starts, lengths = common_runs(*(some.permute(1, 2, 0) for some in planes))
    found = list(zip(starts.tolist(), lengths.tolist(), strict=True))
    assert found == runs_of(*(some.permute(1, 2, 0).reshape(-1, 3) for some in planes))


def test_scores_in_descending_order() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-3, 4, (500,), generator=generator).double() / 4
    scores[::7], scores[3::50], scores[4::60] = -0.0, math.inf, -math.inf
    assert torch.equal(by_score(scores), (-scores).argsort(stable=True))
    scores[[5, 60]] = math.nan
    assert torch.equal(by_score(scores), (-scores).argsort(stable=True))


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(4, 200), (256, 3), (300, 300)])
def test_pairs_are_counted(kind: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    highest = [min(size, 256 if kind == torch.uint8 else size) for size in shape]
    small = [torch.randint(0, high, (9, 5), generator=generator) for high in highest]
    for repeats in (1, 7, 20):
        # of a storage whose start is no word
        maps = [side.repeat_interleave(repeats, 1).to(kind).flatten()[3:] for side in small]
        expected = torch.zeros(shape, dtype=torch.int64)
        for row, column in zip(*(side.tolist() for side in maps), strict=True):
            expected[row, column] += 1
        assert torch.equal(joint_histogram(*maps, shape), expected)
    assert not joint_histogram(maps[0][:0], maps[1][:0], shape).any()
