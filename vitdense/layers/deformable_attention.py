"""Deformable attention over several maps, in plain torch (Zhu et al. 2021, Deformable DETR)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitdense.layers.attention import check_heads
from vitdense.layers.linear import Linear
from vitdense.structures import Size


def deformable_sampling(
    values: Tensor, shapes: list[Size], points: list[int], locations: Tensor, weights: Tensor
) -> Tensor:
    """Weighted sums of bilinear samples from several maps.

    Each level is sampled and added to the sum at once, with the points along the rows of the
    sampling grid. Joining the samples of all levels, to sum over their short last axis, would take
    twice the time on CPU.

    Args:
        values: float [B, S, heads, width], the cells of all maps one after the other.
        shapes: (height, width) of each map; the areas sum to S.
        points: how many of the P points lie on each map.
        locations: float [B, Q, heads, P, 2], x and y in 0..1 of the map, corners not aligned;
            samples outside count as zero.
        weights: float [B, Q, heads, P].

    Returns:
        float [B, Q, heads * width].
    """
    batch, _, heads, _ = values.shape
    areas = [height * width for height, width in shapes]
    maps = values.permute(0, 2, 3, 1).flatten(0, 1).split(areas, -1)
    grids = (2 * locations - 1).permute(0, 2, 3, 1, 4).flatten(0, 1).split(points, 1)
    shares = weights.permute(0, 2, 3, 1).flatten(0, 1)[:, None].split(points, 2)
    total = torch.zeros((), dtype=values.dtype, device=values.device)
    for cells, shape, grid, share in zip(maps, shapes, grids, shares, strict=True):
        samples = F.grid_sample(cells.unflatten(-1, shape), grid, align_corners=False)
        total = total + (samples * share).sum(2)
    return total.unflatten(0, (batch, heads)).flatten(1, 2).transpose(1, 2)


class DeformableAttention(nn.Module):
    """Each query looks at a few points around its reference on every map.

    Args:
        width: of queries and cells.
        heads: of attention.
        levels: how many maps there are.
        points: sampled by each head on each map: one number for all, or one for each.
        reach: for reference boxes, an offset of 1 is `reach / points` of the box's width or height.
        project: whether there are linear layers before and after the sampling, as usual.

    Raises:
        ValueError: the width is no multiple of the heads, or points are not one per level.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        levels: int,
        points: int | Sequence[int],
        reach: float = 0.5,
        project: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.reach = check_heads(width, heads), reach
        self.points = [points] * levels if isinstance(points, int) else list(points)
        if len(self.points) != levels:
            raise ValueError(f"points: {self.points} must be one number or {levels}, one per level")
        total = sum(self.points)
        self.offsets = Linear(width, heads * total * 2)
        self.weights = Linear(width, heads * total)
        self.value = Linear(width, width) if project else nn.Identity()
        self.output = Linear(width, width) if project else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each head looks in a direction of its own, point k at k cells; all weights are equal."""
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        directions = torch.stack((angles.cos(), angles.sin()), -1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        steps = torch.cat([torch.arange(1, count + 1) for count in self.points])
        with torch.no_grad():
            self.offsets.bias.copy_((directions[:, None] * steps[:, None]).flatten())
        for parameter in (self.offsets.weight, self.weights.weight, self.weights.bias):
            nn.init.zeros_(parameter)
        for linear in (self.value, self.output):
            if isinstance(linear, nn.Linear):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)

    def forward(
        self, queries: Tensor, references: Tensor, memory: Tensor, shapes: list[Size]
    ) -> Tensor:
        """Attend.

        Args:
            queries: float [B, Q, width], content plus position.
            references: float [B or 1, Q, 2 or 4] in 0..1 of the canvas: points (x, y), from which
                offsets count in cells of each map, or boxes (cx, cy, w, h), see `reach`.
            memory: float [B, S, width], the cells of all maps.
            shapes: (height, width) of each map.

        Returns:
            float [B, Q, width].
        """
        values = self.value(memory).unflatten(-1, (self.heads, -1))
        weights = self.weights(queries).unflatten(-1, (self.heads, -1)).softmax(-1)
        offsets = self.offsets(queries).unflatten(-1, (self.heads, -1, 2))
        # bfloat16 places a point on a map of 80 cells only to the nearest third of a cell
        precise = torch.promote_types(queries.dtype, torch.float32)
        references = references[:, :, None, None].to(precise)
        units = self._units(shapes, references)
        if references.shape[-1] == 4:
            units = units * references[..., 2:]
        locations = references[..., :2] + offsets.to(precise) * units
        sampled = deformable_sampling(
            values.to(precise), shapes, self.points, locations, weights.to(precise)
        )
        return self.output(sampled.to(queries.dtype))

    def _units(self, shapes: list[Size], references: Tensor) -> Tensor:
        """float [P, 2]: how far an offset of 1 moves each point, in x and y.

        From reference points one cell of its map, in 0..1; from boxes a share of the box.
        """
        if references.shape[-1] == 2:
            each = [(1 / width, 1 / height) for height, width in shapes]
        else:
            each = [(self.reach / count, self.reach / count) for count in self.points]
        units = [unit for unit, count in zip(each, self.points, strict=True) for _ in range(count)]
        tensor = torch.tensor(units, dtype=references.dtype)
        # made on a GPU, it would make the host wait
        return tensor.to(references.device, non_blocking=True)
