"""Deformable attention over several maps, in plain torch (Zhu et al. 2021, Deformable DETR)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitdense.structures import Size


def deformable_sampling(
    values: Tensor, shapes: list[Size], locations: Tensor, weights: Tensor
) -> Tensor:
    """Weighted sums of bilinear samples from several maps.

    Points are rows of the sampling grid and each level is summed as it comes: this needs neither
    the samples of all levels side by side nor a sum over a short last axis, which takes half of
    the time on CPU.

    Args:
        values: float [B, S, heads, width], the cells of all maps one after the other.
        shapes: (height, width) of each map; the areas sum to S.
        locations: float [B, Q, heads, levels, points, 2], x and y in 0..1 of the map, corners
            not aligned; samples outside count as zero.
        weights: float [B, Q, heads, levels, points].

    Returns:
        float [B, Q, heads * width].
    """
    batch, _, heads, _ = values.shape
    maps = values.permute(0, 2, 3, 1).flatten(0, 1)
    grids = (2 * locations - 1).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # levels, BH, points, Q, 2
    weights = weights.permute(3, 0, 2, 4, 1).flatten(1, 2)[:, :, None]  # levels, BH, 1, points, Q
    areas = [height * width for height, width in shapes]
    total = torch.zeros((), dtype=values.dtype, device=values.device)
    for level, cells in enumerate(maps.split(areas, -1)):
        samples = F.grid_sample(
            cells.unflatten(-1, shapes[level]), grids[level], align_corners=False
        )
        total = total + (samples * weights[level]).sum(2)
    return total.unflatten(0, (batch, heads)).flatten(1, 2).transpose(1, 2)


class DeformableAttention(nn.Module):
    """Each query looks at a few points around its reference on every map.

    Raises:
        ValueError: if the width is no multiple of the heads.
    """

    def __init__(self, width: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads: {heads} does not divide the width {width}")
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.weights = nn.Linear(width, heads * levels * points)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Heads start in directions around the circle, point k at k cells, with equal weights."""
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        directions = torch.stack((angles.cos(), angles.sin()), -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1)[:, None]
        offsets = (directions[:, None, None] * steps).expand(-1, self.levels, -1, -1)
        with torch.no_grad():
            self.offsets.bias.copy_(offsets.flatten())
        for parameter in (self.offsets.weight, self.weights.weight, self.weights.bias):
            nn.init.zeros_(parameter)
        for linear in (self.value, self.output):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, queries: Tensor, references: Tensor, memory: Tensor, shapes: list[Size]
    ) -> Tensor:
        """Attend.

        Args:
            queries: float [B, Q, width], content plus position.
            references: float [B or 1, Q, 2 or 4] in 0..1 of the canvas: points (x, y), offsets in
                cells of each map; or boxes (cx, cy, w, h), offsets in half boxes over the points.
            memory: float [B, S, width], the cells of all maps.
            shapes: (height, width) of each map.

        Returns:
            float [B, Q, width].
        """
        values = self.value(memory).unflatten(-1, (self.heads, -1))
        weights = self.weights(queries).unflatten(-1, (self.heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, (self.levels, self.points))
        offsets = self.offsets(queries).unflatten(-1, (self.heads, self.levels, self.points, 2))
        # bfloat16 places a point on a map of 80 cells only to the nearest third of a cell
        precise = torch.promote_types(queries.dtype, torch.float32)
        references = references[:, :, None, None, None].to(precise)
        if references.shape[-1] == 2:
            locations = references + offsets.to(precise) / _cells(shapes, references)
        else:
            reach = references[..., 2:] * (0.5 / self.points)
            locations = references[..., :2] + offsets.to(precise) * reach
        sampled = deformable_sampling(values.to(precise), shapes, locations, weights.to(precise))
        return self.output(sampled.to(queries.dtype))


def _cells(shapes: list[Size], like: Tensor) -> Tensor:
    """[levels, 1, 2] width and height of each map, copied without waiting for the device."""
    sizes = torch.tensor([(width, height) for height, width in shapes], dtype=like.dtype)
    return sizes[:, None].to(like.device, non_blocking=True)
