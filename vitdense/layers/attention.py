"""Multi-head attention on `F.scaled_dot_product_attention`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vitdense.layers.linear import Linear


class Attention(nn.Module):
    """Multi-head attention, batch first.

    A tenth to a quarter faster on CPU than `nn.MultiheadAttention`, which transposes to
    sequence-first and back.

    Args:
        dropout: of the attention weights.

    Raises:
        ValueError: the width is no multiple of the heads.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = check_heads(width, heads)
        self.dropout = dropout
        self.query = Linear(width, width)
        self.key = Linear(width, width)
        self.value = Linear(width, width)
        self.output = Linear(width, width)
        for linear in (self.query, self.key, self.value):
            # as DETR, which initialises the three as one matrix of 3 * width rows
            nn.init.xavier_uniform_(linear.weight, gain=0.5**0.5)
        nn.init.xavier_uniform_(self.output.weight)
        for linear in (self.query, self.key, self.value, self.output):
            nn.init.zeros_(linear.bias)

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """float [B, Q, width], [B, K, width], [B, K, width] -> [B, Q, width].

        `mask`, bool and broadcastable to [B, heads, Q, K], says which keys a query may see.
        """
        return self.output(
            attend(
                self.query(queries),
                self.key(keys),
                self.value(values),
                self.heads,
                dropout=self.dropout if self.training else 0.0,
                mask=mask,
            )
        )


def check_heads(width: int, heads: int) -> int:
    """The number of heads; raises ValueError if it does not divide the width."""
    if width % heads:
        raise ValueError(f"heads: {heads} does not divide the width {width}")
    return heads


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    heads: int,
    *,
    dropout: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Multi-head attention without its projections.

    Args:
        queries, keys: float [B, Q, heads * A] and [B, K, heads * A].
        values: float [B, K, heads * V].
        mask: bool, broadcastable to [B, heads, Q, K]: which keys a query may see.

    Returns:
        float [B, Q, heads * V].
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (queries, keys, values))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return attended.transpose(1, 2).flatten(2)
