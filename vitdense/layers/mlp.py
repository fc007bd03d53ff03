"""Feed-forward parts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from vitdense.layers.linear import Linear


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        widths: of the input, of every hidden layer, and of the output.
    """

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """float [..., first width] -> [..., last width]."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class FeedForward(nn.Module):
    """The second half of a transformer layer: two linear layers, residual, then norm."""

    def __init__(
        self,
        width: int,
        hidden: int,
        dropout: float,
        activation: Callable[[Tensor], Tensor] = F.relu,
    ) -> None:
        """`activation` may be a module that learns."""
        super().__init__()
        self.activation = activation
        self.expand = Linear(width, hidden)
        self.reduce = Linear(hidden, width)
        nn.init.xavier_uniform_(self.expand.weight)
        nn.init.xavier_uniform_(self.reduce.weight)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """float [..., width] -> the same shape."""
        hidden = self.dropout(self.activation(self.expand(x)))
        return self.norm(x + self.dropout(self.reduce(hidden)))
