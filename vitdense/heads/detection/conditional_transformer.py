"""Decoder layers of Conditional DETR (Meng et al. 2021): what to look for, apart from where."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitdense.layers.attention import attend, check_heads
from vitdense.layers.linear import Linear
from vitdense.layers.mlp import FeedForward


class ConditionalSelfAttention(nn.Module):
    """Queries attend to each other; content and place have projections of their own."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = check_heads(width, heads), dropout
        self.query, self.query_place = projection(width), projection(width)
        self.key, self.key_place = projection(width), projection(width)
        self.value, self.output = projection(width), projection(width)

    def forward(self, queries: Tensor, places: Tensor) -> Tensor:
        """float [B, Q, width] and [B or 1, Q, width] -> [B, Q, width]."""
        attended = attend(
            self.query(queries) + self.query_place(places),
            self.key(queries) + self.key_place(places),
            self.value(queries),
            self.heads,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.output(attended)


class ConditionalCrossAttention(nn.Module):
    """Attention logits are the product of the contents plus that of the places, in every head.

    Args:
        width: of queries and cells.
        heads: of attention.
        dropout: of the attention weights.
        first: whether it is in the first layer, where queries have no content yet; there places
            are also added to the contents, as in DETR.
    """

    def __init__(self, width: int, heads: int, dropout: float, first: bool) -> None:
        super().__init__()
        self.heads, self.dropout = check_heads(width, heads), dropout
        self.query, self.query_spatial = projection(width), projection(width)
        self.query_place = projection(width) if first else None
        self.key, self.key_place = projection(width), projection(width)
        self.value, self.output = projection(width), projection(width)

    def forward(
        self, queries: Tensor, places: Tensor, spatial: Tensor, positions: Tensor, cells: Tensor
    ) -> Tensor:
        """Attend to the cells.

        Args:
            queries: float [B, Q, width], the content.
            places: float [B or 1, Q, width]; only the first layer reads them.
            spatial: float [B or 1, Q, width], the sine embedding of where to look.
            positions: float [1, S, width], the sine embedding of the cells.
            cells: float [B, S, width].
        """
        query, key, where = self.query(queries), self.key(cells), self.key_place(positions)
        if self.query_place is not None:
            query, key = query + self.query_place(places), key + where
        attended = attend(
            self._join(query, self.query_spatial(spatial)),
            self._join(key, where),
            self.value(cells),
            self.heads,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.output(attended)

    def _join(self, content: Tensor, place: Tensor) -> Tensor:
        """[B, N, width] twice -> [B, N, 2 * width], side by side in every head."""
        both = [x.unflatten(-1, (self.heads, -1)) for x in (content, place.expand_as(content))]
        return torch.cat(both, -1).flatten(2)


class ConditionalDecoderLayer(nn.Module):
    """Queries attend to each other, then to the cells by content and by place."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        dropout: float,
        first: bool,
        activation: Callable[[Tensor], Tensor] = F.relu,
    ) -> None:
        super().__init__()
        self.self_attention = ConditionalSelfAttention(width, heads, dropout)
        self.self_norm = nn.LayerNorm(width)
        self.cross_attention = ConditionalCrossAttention(width, heads, dropout, first)
        self.cross_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.feed_forward = FeedForward(width, hidden, dropout, activation)

    def forward(
        self, queries: Tensor, places: Tensor, spatial: Tensor, positions: Tensor, cells: Tensor
    ) -> Tensor:
        """Update the queries [B, Q, width]; the arguments are those of the cross attention."""
        queries = self.self_norm(queries + self.dropout(self.self_attention(queries, places)))
        update = self.cross_attention(queries, places, spatial, positions, cells)
        queries = self.cross_norm(queries + self.dropout(update))
        return self.feed_forward(queries)


def projection(width: int) -> nn.Linear:
    """A linear layer of equal widths, Xavier-uniform, its bias zero."""
    linear = Linear(width, width)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
