"""What the queries of `detr` are, and how they tell the attention where to look.

Each kind holds what is learned for every query. `references` gives what boxes are relative to, as
logits of cxcywh; called in front of a decoder layer it gives what that layer reads beside the
content; between two layers `refine` gives the references that boxes are relative to from now on,
and the same to look at.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitdense.layers.mlp import MLP
from vitdense.layers.position import box_embedding

LIMIT = math.log(1e5 - 1)
"""Logits of references stay within: coordinates from 1e-5 to 1 - 1e-5."""

SMALLEST = 1e-4
"""Side of a reference box, as a share of the image, below which attention narrows no further."""


class LearnedQueries(nn.Module):
    """Vectors, which attention adds to the content (Carion et al. 2020, DETR)."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, width))

    def references(self) -> Tensor:
        """Boxes are relative to nothing: float [1, Q, 4], zeros."""
        return self.weight.new_zeros(1, len(self.weight), 4)

    def forward(self, references: Tensor, content: Tensor, first: bool) -> tuple[Tensor, ...]:
        """The places [1, Q, width]."""
        return (self.weight[None],)

    def refine(
        self, references: Tensor, content: Tensor, predict: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """The same references twice."""
        return references, references


class PointQueries(LearnedQueries):
    """Vectors with a point each, around which attention looks (Meng et al. 2021, Conditional DETR).

    The sine embedding of the point is scaled by what the content asks for: which way to look.
    """

    def __init__(self, count: int, width: int, layers: int) -> None:
        super().__init__(count, width)
        self.point = xavier(MLP(width, width, 2))
        self.scale = xavier(MLP(width, width, width)) if layers > 1 else None

    def references(self) -> Tensor:
        """The points, without a size: float [1, Q, 4]."""
        # autocast makes them too coarse for angles
        points = self.point(self.weight).to(self.weight.dtype).clamp(-LIMIT, LIMIT)
        return F.pad(points, (0, 2))[None]

    def forward(self, references: Tensor, content: Tensor, first: bool) -> tuple[Tensor, ...]:
        """The places [1, Q, width] and where to look [B or 1, Q, width]."""
        spatial = place_embedding(references[..., :2].sigmoid(), self.weight.shape[1])
        if self.scale is not None and not first:
            spatial = spatial * self.scale(content)
        return self.weight[None], spatial


class BoxQueries(nn.Module):
    """Boxes that every layer corrects, and nothing else (Liu et al. 2022, DAB-DETR).

    The embedding of a box's centre is scaled by what the content asks for, and along each axis by
    the side that the content asks for over that of the box: attention is as wide as the object.
    """

    def __init__(self, count: int, width: int, layers: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.randn(count, 4))
        self.place = xavier(MLP(2 * width, width, width))
        self.size = xavier(MLP(width, width, 2))
        self.scale = xavier(MLP(width, width, width)) if layers > 1 else None

    def references(self) -> Tensor:
        """The boxes of the first layer: float [1, Q, 4]."""
        return self.weight.clamp(-LIMIT, LIMIT)[None]

    def forward(self, references: Tensor, content: Tensor, first: bool) -> tuple[Tensor, ...]:
        """The places and where to look, float [B or 1, Q, width] and [B, Q, width]."""
        boxes = references.sigmoid()
        embedded = place_embedding(boxes, self.width)
        spatial = embedded[..., : self.width]
        if self.scale is not None and not first:
            spatial = spatial * self.scale(content)
        ratios = self.size(content).sigmoid() / boxes[..., 2:].clamp(min=SMALLEST)
        # the first half of the embedding tells y
        scaled = spatial.unflatten(-1, (2, -1)) * ratios.flip(-1)[..., None]
        return self.place(embedded), scaled.flatten(-2)

    def refine(
        self, references: Tensor, content: Tensor, predict: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """The boxes moved; the next layer's loss trains the move, but not where it looks."""
        moved = (references + predict(content)).clamp(-LIMIT, LIMIT)
        return moved, moved.detach()


def place_embedding(references: Tensor, width: int) -> Tensor:
    """Points or boxes [..., 2 or 4] in 0..1 -> [..., 1 or 2 times `width`], y before x."""
    x, y, size = references[..., :1], references[..., 1:2], references[..., 2:]
    return box_embedding(torch.cat((y, x, size), -1), width // 2)


def xavier(mlp: MLP) -> MLP:
    """The same, initialised as both papers' code does with all that is in the transformer."""
    for parameter in mlp.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
    return mlp
