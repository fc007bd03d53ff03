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


def sample_by_loop(values, shapes, locations, weights) -> torch.Tensor:
    batch, queries, heads, levels, points, _ = locations.shape
    out = values.new_zeros(batch, queries, heads, values.shape[-1])
    starts = [0, 24]
    for b, q, h, l, p in torch.cartesian_prod(
        *[torch.arange(n) for n in (batch, queries, heads, levels, points)]
    ).tolist():
        height, width = shapes[l]
        cells = values[b, starts[l] : starts[l] + height * width, h].view(height, width, -1)
        x, y = locations[b, q, h, l, p].tolist()
        sample = bilinear(cells, x * width - 0.5, y * height - 0.5)
        out[b, q, h] += weights[b, q, h, l, p] * sample
    return out.flatten(2)


def make_inputs(queries: int = 5, heads: int = 2, width: int = 3, points: int = 4):
    torch.manual_seed(0)
    values = torch.randn(2, CELLS, heads, width, dtype=torch.float64)
    # some points lie outside the maps
    locations = torch.rand(2, queries, heads, 2, points, 2, dtype=torch.float64) * 1.4 - 0.2
    weights = torch.rand(2, queries, heads, 2, points, dtype=torch.float64)
    return values, locations, weights


def test_sampling_equals_a_loop_over_points():
    values, locations, weights = make_inputs()
    expected = sample_by_loop(values, SHAPES, locations, weights)
    torch.testing.assert_close(deformable_sampling(values, SHAPES, locations, weights), expected)


def test_sampling_passes_gradcheck():
    inputs = [x.requires_grad_() for x in make_inputs(queries=2, width=2, points=2)]

    def sample(values, locations, weights):
        return deformable_sampling(values, SHAPES, locations, weights)

    assert torch.autograd.gradcheck(sample, inputs)


@pytest.mark.parametrize("coordinates", [2, 4])
def test_module_places_points_around_its_references(coordinates):
    torch.manual_seed(0)
    module = DeformableAttention(8, heads=2, levels=2, points=3).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    queries = torch.randn(2, 5, 8, dtype=torch.float64)
    memory = torch.randn(2, CELLS, 8, dtype=torch.float64)
    references = torch.rand(2, 5, coordinates, dtype=torch.float64)
    offsets = module.offsets(queries).view(2, 5, 2, 2, 3, 2)
    weights = module.weights(queries).view(2, 5, 2, 6).softmax(-1).view(2, 5, 2, 2, 3)
    centres = references[:, :, None, None, None, :2]
    if coordinates == 2:
        scale = torch.tensor([[4.0, 6], [2, 3]], dtype=torch.float64)  # widths and heights
        locations = centres + offsets / scale[:, None]
    else:
        locations = centres + offsets / 3 * references[:, :, None, None, None, 2:] / 2
    values = module.value(memory).view(2, CELLS, 2, 4)
    expected = module.output(sample_by_loop(values, SHAPES, locations, weights))
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
