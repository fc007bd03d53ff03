"""Multi-layer perceptrons."""

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


def start_at_zero(mlp: MLP) -> MLP:
    """The MLP, whose output is zero at first."""
    nn.init.zeros_(mlp.layers[-1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(mlp.layers[-1].bias)  # type: ignore[arg-type]
    return mlp


class FeedForward(nn.Module):
    """The second half of a transformer layer: two linear layers, residual, then norm.

    Args:
        hidden: width between the two.
        dropout: before and after the second.
        activation: a function, or a module that learns.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        dropout: float,
        activation: Callable[[Tensor], Tensor] = F.relu,
    ) -> None:
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
