"""Encoder and decoder layers with deformable attention, and predictors of class and box."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitdense.layers.attention import Attention
from vitdense.layers.deformable_attention import DeformableAttention
from vitdense.layers.linear import Linear
from vitdense.layers.mlp import MLP, FeedForward, start_at_zero
from vitdense.structures import Size

EPS = 1e-5
"""Coordinates are kept this far from 0 and 1 before their logit is taken."""

RARE = -math.log(99)
"""First logit of every class: a probability of 0.01, so that negatives do not drown all else."""


class DeformableEncoderLayer(nn.Module):
    """Every cell attends to a few points around itself on every level."""

    def __init__(
        self, width: int, heads: int, hidden: int, dropout: float, levels: int, points: int
    ) -> None:
        super().__init__()
        self.attention = DeformableAttention(width, heads, levels, points)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.feed_forward = FeedForward(width, hidden, dropout)

    def forward(
        self, cells: Tensor, positions: Tensor, references: Tensor, shapes: list[Size]
    ) -> Tensor:
        """float [B, S, width], [1, S, width], [1, S, 2] -> [B, S, width]."""
        update = self.attention(cells + positions, references, cells, shapes)
        return self.feed_forward(self.norm(cells + self.dropout(update)))


class DeformableDecoderLayer(nn.Module):
    """Queries attend to each other, then to a few points around their references.

    Args:
        width: of queries and cells.
        heads: of attention among the queries.
        cross_heads: of attention to the cells; None = `heads`.
        hidden: width of the feed-forward layer.
        levels, points, reach: of the deformable attention.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        dropout: float,
        levels: int,
        points: int | Sequence[int],
        *,
        cross_heads: int | None = None,
        reach: float = 0.5,
    ) -> None:
        super().__init__()
        self.self_attention = Attention(width, heads, dropout)
        self.self_norm = nn.LayerNorm(width)
        self.cross_attention = DeformableAttention(
            width, cross_heads or heads, levels, points, reach
        )
        self.cross_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.feed_forward = FeedForward(width, hidden, dropout)

    def forward(
        self,
        queries: Tensor,
        places: Tensor,
        references: Tensor,
        memory: Tensor,
        shapes: list[Size],
        mask: Tensor | None = None,
        groups: int = 1,
    ) -> Tensor:
        """Update the queries.

        Args:
            queries, places: float [B, Q, width], content and position.
            references: float [B, Q, 2 or 4] in 0..1, points or boxes.
            memory: float [B, S, width], the cells of all levels.
            shapes: (height, width) of each level.
            mask: bool [Q, Q], which other queries (columns) each may see.
            groups: how many groups the queries consist of; they do not see each other.
        """
        update = _attend_in_groups(self.self_attention, queries, places, mask, groups)
        queries = self.self_norm(queries + self.dropout(update))
        update = self.cross_attention(queries + places, references, memory, shapes)
        return self.feed_forward(self.merge(queries, self.dropout(update)))

    def merge(self, queries: Tensor, update: Tensor) -> Tensor:
        """Queries and what they saw in the cells, normed."""
        return self.cross_norm(queries + update)


def _attend_in_groups(
    attention: Attention, queries: Tensor, places: Tensor, mask: Tensor | None, groups: int
) -> Tensor:
    batch = len(queries)
    if groups > 1:
        queries, places = (x.reshape(batch * groups, -1, x.shape[-1]) for x in (queries, places))
    placed = queries + places
    return attention(placed, placed, queries, mask).reshape(batch, -1, queries.shape[-1])


class Predictor(nn.Module):
    """Class and box of each query, for sigmoid losses and boxes relative to references.

    Args:
        start: initial logit of widths and heights, for references that are points.
        eps: how far coordinates of references are kept from 0 and 1.
    """

    def __init__(self, width: int, classes: int, start: float = 0.0, eps: float = EPS) -> None:
        super().__init__()
        self.eps = eps
        self.classes = Linear(width, classes)
        self.boxes = start_at_zero(MLP(width, width, width, 4))
        nn.init.constant_(self.classes.bias, RARE)
        nn.init.constant_(self.boxes.layers[-1].bias[2:], start)  # type: ignore[index]

    def forward(self, queries: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
        """Predict.

        Args:
            queries: float [..., width].
            references: points or boxes, float [..., 2 or 4] in 0..1.

        Returns:
            logits [..., classes], and boxes [..., 4] in 0..1, cxcywh: the references moved.
        """
        return self.classes(queries), self.move(references, self.boxes(queries))

    def move(self, references: Tensor, deltas: Tensor) -> Tensor:
        """References moved by deltas of the logits of their coordinates, float [..., 4] in 0..1."""
        # torch.logit would clamp to 1 - eps where DETR's code divides 1 by eps
        logits = references.clamp(min=self.eps).log() - (1 - references).clamp(min=self.eps).log()
        if references.shape[-1] == 2:
            logits = F.pad(logits, (0, 2))
        return (logits + deltas).sigmoid()


class ScaledPredictor(Predictor):
    """Boxes move by widths and heights of their references and grow by factors, as in R-CNN."""

    def move(self, references: Tensor, deltas: Tensor) -> Tensor:
        """Reference boxes moved in units of their own size; not bounded to 0..1."""
        # a factor of half precision is coarse, and overflows from exp(11) on
        deltas = deltas.to(torch.promote_types(deltas.dtype, torch.float32))
        size = references[..., 2:]
        centres = deltas[..., :2] * size + references[..., :2]
        return torch.cat((centres, deltas[..., 2:].exp() * size), -1)
