"""The kinds of queries of `detr`: what is learned for each, and where it lets attention look.

- `references()`: logits of cxcywh, float [1, Q, 4], to which boxes of the first layer are relative.
- `forward(...)`: what a decoder layer reads beside the content of the queries.
- `refine(...)`: after a layer, the references that boxes are relative to from then on, and those
  that attention looks at, which may be the same without a gradient.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitdense.layers.mlp import MLP
from vitdense.layers.position import box_embedding

LIMIT = math.log(1e5 - 1)
"""Bound on logits of references: coordinates lie in 1e-5 .. 1 - 1e-5."""

SMALLEST = 1e-4
"""Attention is as narrow as the reference box, but not narrower than this share of the image."""


class LearnedQueries(nn.Module):
    """Vectors, which attention adds to the content (Carion et al. 2020, DETR)."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, width))

    def references(self) -> Tensor:
        """Zeros, float [1, Q, 4]: boxes are relative to nothing."""
        return self.weight.new_zeros(1, len(self.weight), 4)

    def forward(self, references: Tensor, content: Tensor, first: bool) -> tuple[Tensor, ...]:
        """The places [1, Q, width]."""
        return (self.weight[None],)

    def refine(
        self, references: Tensor, content: Tensor, predict: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """The references unchanged, for boxes and for attention."""
        return references, references


class PointQueries(LearnedQueries):
    """Vectors with a point each, around which attention looks (Meng et al. 2021, Conditional DETR).

    The content scales the sine embedding of the point, which says in which direction to look.
    """

    def __init__(self, count: int, width: int, layers: int) -> None:
        super().__init__(count, width)
        self.point = xavier(MLP(width, width, 2))
        self.scale = xavier(MLP(width, width, width)) if layers > 1 else None

    def references(self) -> Tensor:
        """The points, without a size: float [1, Q, 4]."""
        # back from autocast's type, which is too coarse for angles
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

    The content scales the sine embedding of a box's centre. It also predicts a width and a height,
    and each axis is scaled by their ratio to those of the box: attention is as wide as the object.
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
        """The moved boxes: for the next boxes with a gradient, for attention without one."""
        moved = (references + predict(content)).clamp(-LIMIT, LIMIT)
        return moved, moved.detach()


def place_embedding(references: Tensor, width: int) -> Tensor:
    """Points or boxes [..., 2 or 4] in 0..1 -> [..., 1 or 2 times `width`], y before x."""
    x, y, size = references[..., :1], references[..., 1:2], references[..., 2:]
    return box_embedding(torch.cat((y, x, size), -1), width // 2)


def xavier(mlp: MLP) -> MLP:
    """The MLP with Xavier-uniform weights, as in the code of both papers."""
    for parameter in mlp.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
    return mlp
