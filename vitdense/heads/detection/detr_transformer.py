"""Encoder and decoder layers with global attention (Carion et al. 2020, DETR)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from vitdense.layers.attention import Attention
from vitdense.layers.mlp import FeedForward


class DetrEncoderLayer(nn.Module):
    """Every cell attends to every cell."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        dropout: float,
        activation: Callable[[Tensor], Tensor] = F.relu,
    ) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.feed_forward = FeedForward(width, hidden, dropout, activation)

    def forward(self, cells: Tensor, positions: Tensor) -> Tensor:
        """float [B, S, width], [B or 1, S, width] -> [B, S, width]."""
        placed = cells + positions
        cells = self.norm(cells + self.dropout(self.attention(placed, placed, cells)))
        return self.feed_forward(cells)


class DetrDecoderLayer(nn.Module):
    """Queries attend to each other, then to every cell."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = Attention(width, heads, dropout)
        self.self_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads, dropout)
        self.cross_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.feed_forward = FeedForward(width, hidden, dropout)

    def forward(self, queries: Tensor, places: Tensor, keys: Tensor, cells: Tensor) -> Tensor:
        """Update the queries.

        Args:
            queries: float [B, Q, width], the content.
            places: float [B or 1, Q, width], the learned positions.
            keys, cells: float [B, S, width], the memory with and without positions.
        """
        placed = queries + places
        update = self.self_attention(placed, placed, queries)
        queries = self.self_norm(queries + self.dropout(update))
        update = self.cross_attention(queries + places, keys, cells)
        queries = self.cross_norm(queries + self.dropout(update))
        return self.feed_forward(queries)
