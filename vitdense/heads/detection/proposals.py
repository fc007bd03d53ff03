"""The first stage: every cell proposes a box, and the best become references of queries."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitdense.heads.detection.deformable_transformer import Predictor
from vitdense.layers.linear import Linear
from vitdense.structures import Size


class Proposals(NamedTuple):
    """What cells propose.

    Attributes:
        cells: float [B, S, width], the features that were judged.
        logits: float [B, S, classes].
        boxes: float [B, S, 4], cxcywh in 0..1.
    """

    cells: Tensor
    logits: Tensor
    boxes: Tensor

    def best(self, count: int) -> Proposals:
        """The `count` cells of highest score, best first; equal ones in the order of the cells."""
        order = best_cells(self.logits, count)[..., None]
        return Proposals(*(x.gather(1, order.expand(-1, -1, x.shape[-1])) for x in self))


class FirstStage(nn.Module):
    """Class and box of every cell (Zhu et al. 2021, Deformable DETR, appendix A.4).

    Args:
        predictor: of class and box.
        nowhere: all coordinates of boxes of unusable cells, those too near the border.
        unusable_last: unusable cells are chosen after all others, as in LW-DETR; else by score.
    """

    def __init__(
        self,
        width: int,
        predictor: Predictor,
        nowhere: float = 1.0,
        unusable_last: bool = False,
    ) -> None:
        super().__init__()
        self.project = nn.Sequential(Linear(width, width), nn.LayerNorm(width))
        self.predictor = predictor
        self.nowhere, self.unusable_last = nowhere, unusable_last

    def forward(self, memory: Tensor, anchors: Tensor, usable: Tensor) -> Proposals:
        """Proposals of cells [B, S, width]; `cell_anchors` gives the other arguments."""
        cells = self.project(memory.masked_fill(~usable, 0.0))
        logits, boxes = self.predictor(cells, anchors)
        return Proposals(cells, logits, boxes.masked_fill(~usable, self.nowhere))

    def best(self, memory: Tensor, anchors: Tensor, usable: Tensor, count: int) -> Proposals:
        """The `count` cells of highest score, best first; only these get boxes and gradients."""
        # detached, not under no_grad, where autocast would cache copies of weights without gradient
        logits = self.predictor.classes(self.project(memory.detach().masked_fill(~usable, 0.0)))
        if self.unusable_last:
            logits = logits.masked_fill(~usable, -torch.inf)
        order = best_cells(logits, count)
        chosen = memory.gather(1, order[..., None].expand(-1, -1, memory.shape[-1]))
        return self(chosen, anchors[order], usable[order])


def best_cells(logits: Tensor, count: int) -> Tensor:
    """int64 [B, count]: cells by their best class, best first; equal ones in the order of cells."""
    scores = logits.detach().amax(-1)
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


def cell_anchors(shapes: list[Size], like: Tensor, side: float = 0.05) -> tuple[Tensor, Tensor]:
    """A square box in each cell, twice as large on each coarser level.

    Args:
        side: of the boxes of the finest level, in 0..1.

    Returns:
        boxes, float [S, 4], cxcywh in 0..1; and whether each lies far enough from the border to be
        used, bool [S, 1].
    """
    centres = cell_centres(shapes, like)
    sides = [
        centres.new_full((height * width, 2), side * 2**level)
        for level, (height, width) in enumerate(shapes)
    ]
    boxes = torch.cat((centres, torch.cat(sides)), -1)
    return boxes, ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True)


def cell_centres(shapes: list[Size], like: Tensor) -> Tensor:
    """Centres of the cells of all levels, row by row: [S, 2], x and y in 0..1."""
    centres = []
    for height, width in shapes:
        y = (torch.arange(height, device=like.device, dtype=like.dtype) + 0.5) / height
        x = (torch.arange(width, device=like.device, dtype=like.dtype) + 0.5) / width
        centres.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1))
    return torch.cat(centres)
