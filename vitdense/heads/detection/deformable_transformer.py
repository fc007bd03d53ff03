"""Encoder and decoder with deformable attention, and the first stage's proposals."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitdense.layers.attention import Attention
from vitdense.layers.deformable_attention import DeformableAttention
from vitdense.layers.mlp import MLP, FeedForward
from vitdense.layers.position import sine_position
from vitdense.structures import Size


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
    """Queries attend to each other, then to a few points around their references."""

    def __init__(
        self, width: int, heads: int, hidden: int, dropout: float, levels: int, points: int
    ) -> None:
        super().__init__()
        self.self_attention = Attention(width, heads, dropout)
        self.self_norm = nn.LayerNorm(width)
        self.cross_attention = DeformableAttention(width, heads, levels, points)
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
    ) -> Tensor:
        """Update the queries.

        Args:
            queries, places: float [B, Q, width], content and position.
            references: float [B, Q, 2 or 4] in 0..1, points or boxes.
            memory: float [B, S, width], the cells of all levels.
            shapes: (height, width) of each level.
        """
        placed = queries + places
        update = self.self_attention(placed, placed, queries)
        queries = self.self_norm(queries + self.dropout(update))
        update = self.cross_attention(queries + places, references, memory, shapes)
        queries = self.cross_norm(queries + self.dropout(update))
        return self.feed_forward(queries)


class Predictor(nn.Module):
    """Class and box of each query, for focal loss and boxes relative to references."""

    def __init__(self, width: int, classes: int, start: float = 0.0) -> None:
        """`start` is the first logit of widths and heights where references have none."""
        super().__init__()
        self.classes = nn.Linear(width, classes)
        self.boxes = MLP(width, width, width, 4)
        # every class starts at a probability of 0.01, so that the negatives do not drown all else
        nn.init.constant_(self.classes.bias, -math.log(99))
        *_, weight, bias = self.boxes.parameters()
        nn.init.zeros_(weight)
        nn.init.zeros_(bias)
        nn.init.constant_(bias[2:], start)

    def forward(self, queries: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
        """Predict.

        Args:
            queries: float [..., width].
            references: logits of points or boxes, float [..., 2 or 4].

        Returns:
            logits [..., classes], and boxes [..., 4] in 0..1: the references moved, as logits.
        """
        if references.shape[-1] == 2:
            references = F.pad(references, (0, 2))
        return self.classes(queries), (references + self.boxes(queries)).sigmoid()


def cell_centres(shapes: list[Size], like: Tensor) -> Tensor:
    """Centres of the cells of all levels, row by row: [S, 2], x and y in 0..1."""
    centres = []
    for height, width in shapes:
        y = (torch.arange(height, device=like.device, dtype=like.dtype) + 0.5) / height
        x = (torch.arange(width, device=like.device, dtype=like.dtype) + 0.5) / width
        centres.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1))
    return torch.cat(centres)


def cell_positions(shapes: list[Size], level_embed: Tensor) -> Tensor:
    """Position and level of the cells of all levels: [S, width] for level_embed [levels, width]."""
    width = level_embed.shape[-1]
    return torch.cat(
        [
            sine_position(*shape, width, offset=-0.5, like=level_embed) + embed
            for shape, embed in zip(shapes, level_embed, strict=True)
        ]
    )


def cell_proposals(shapes: list[Size], centres: Tensor) -> tuple[Tensor, Tensor]:
    """A square box in each cell, twice as large on each coarser level (appendix A.4).

    Args:
        centres: float [S, 2] in 0..1.

    Returns:
        logits of the boxes, float [S, 4], cxcywh, infinite where a box is not usable because it
        comes too near the border; and whether it is usable, bool [S, 1].
    """
    sides = [
        centres.new_full((height * width, 2), 0.05 * 2**level)
        for level, (height, width) in enumerate(shapes)
    ]
    boxes = torch.cat((centres, torch.cat(sides)), -1)
    usable = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True)
    return boxes.logit().masked_fill(~usable, torch.inf), usable
