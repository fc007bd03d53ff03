"""Deformable attention equals a loop over points, and its gradients are right."""

from __future__ import annotations

import math

import pytest
import torch

from vitdense.layers.deformable_attention import DeformableAttention, deformable_sampling

SHAPES = [(6, 4), (3, 2)]
CELLS = 6 * 4 + 3 * 2


def bilinear(cells: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """Sample [H, W, C] at x, y in cells, the centre of the first cell at 0; outside is zero."""
    height, width, channels = cells.shape
    total = cells.new_zeros(channels)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                total += (1 - abs(x - column)) * (1 - abs(y - row)) * cells[row, column]
    return total


def sample_by_loop(values, shapes, points, locations, weights) -> torch.Tensor:
    batch, queries, heads, _, _ = locations.shape
    out = values.new_zeros(batch, queries, heads, values.shape[-1])
    starts = [0, 24]
    level_of = [level for level, count in enumerate(points) for _ in range(count)]
    for b, q, h, p in torch.cartesian_prod(
        *[torch.arange(n) for n in (batch, queries, heads, sum(points))]
    ).tolist():
        level = level_of[p]
        height, width = shapes[level]
        cells = values[b, starts[level] : starts[level] + height * width, h]
        x, y = locations[b, q, h, p].tolist()
        sample = bilinear(cells.view(height, width, -1), x * width - 0.5, y * height - 0.5)
        out[b, q, h] += weights[b, q, h, p] * sample
    return out.flatten(2)


def make_inputs(queries: int = 5, heads: int = 2, width: int = 3, points: int = 7):
    torch.manual_seed(0)
    values = torch.randn(2, CELLS, heads, width, dtype=torch.float64)
    # some points lie outside the maps
    locations = torch.rand(2, queries, heads, points, 2, dtype=torch.float64) * 1.4 - 0.2
    weights = torch.rand(2, queries, heads, points, dtype=torch.float64)
    return values, locations, weights


@pytest.mark.parametrize("points", [[4, 3], [1, 6]])
def test_sampling_equals_a_loop_over_points(points):
    values, locations, weights = make_inputs()
    expected = sample_by_loop(values, SHAPES, points, locations, weights)
    sampled = deformable_sampling(values, SHAPES, points, locations, weights)
    torch.testing.assert_close(sampled, expected)


def test_sampling_passes_gradcheck():
    inputs = [x.requires_grad_() for x in make_inputs(queries=2, width=2, points=3)]

    def sample(values, locations, weights):
        return deformable_sampling(values, SHAPES, [1, 2], locations, weights)

    assert torch.autograd.gradcheck(sample, inputs)


@pytest.mark.parametrize("points", [3, [2, 5]])
@pytest.mark.parametrize("coordinates", [2, 4])
def test_module_places_points_around_its_references(coordinates, points):
    torch.manual_seed(0)
    module = DeformableAttention(8, heads=2, levels=2, points=points, reach=0.7).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    counts = [points] * 2 if isinstance(points, int) else points
    total = sum(counts)
    queries = torch.randn(2, 5, 8, dtype=torch.float64)
    memory = torch.randn(2, CELLS, 8, dtype=torch.float64)
    references = torch.rand(2, 5, coordinates, dtype=torch.float64)
    offsets = module.offsets(queries).view(2, 5, 2, total, 2)
    weights = module.weights(queries).view(2, 5, 2, total).softmax(-1)
    scales = []
    for (height, width), count in zip(SHAPES, counts, strict=True):
        for _ in range(count):
            scales.append([1 / width, 1 / height] if coordinates == 2 else [0.7 / count] * 2)
    scale = torch.tensor(scales, dtype=torch.float64)
    if coordinates == 4:
        scale = scale * references[:, :, None, None, 2:]
    locations = references[:, :, None, None, :2] + offsets * scale
    values = module.value(memory).view(2, CELLS, 2, 4)
    expected = module.output(sample_by_loop(values, SHAPES, counts, locations, weights))
    torch.testing.assert_close(module(queries, references, memory, SHAPES), expected)


def test_starts_as_the_paper_says():
    module = DeformableAttention(16, heads=4, levels=2, points=3)
    offsets = module.offsets(torch.randn(1, 1, 16)).view(4, 2, 3, 2)
    directions = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    for point in range(3):
        expected = directions[:, None].expand(-1, 2, -1) * (point + 1)
        torch.testing.assert_close(offsets[:, :, point], expected, atol=1e-6, rtol=0)
    assert module.weights(torch.randn(1, 1, 16)).eq(0).all()


def test_half_precision_places_points_precisely():
    torch.manual_seed(0)
    module = DeformableAttention(16, heads=2, levels=1, points=2)
    queries, references = torch.randn(1, 4, 16), torch.rand(1, 4, 2)
    # values that tell where they were sampled: a ramp along x over a long row
    memory = torch.linspace(0, 1, 400)[None, :, None].expand(-1, -1, 16)
    expected = module(queries, references, memory, [(1, 400)])
    with torch.autocast("cpu", torch.bfloat16):
        half = module(queries, references, memory, [(1, 400)])
    torch.testing.assert_close(half.float(), expected, atol=0.02, rtol=0.02)


def test_names_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="heads: 3 does not divide the width 16"):
        DeformableAttention(16, heads=3, levels=1, points=1)


def test_names_points_that_are_not_one_per_level():
    with pytest.raises(ValueError, match=r"points: \[3, 6\] must be one number or 3"):
        DeformableAttention(16, heads=4, levels=3, points=[3, 6])
