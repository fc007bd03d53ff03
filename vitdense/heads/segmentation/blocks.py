"""Layers that the semantic heads share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitdense.layers.norm import Norm, make_norm


class ConvNormReLU(nn.Sequential):
    """A convolution that keeps the size and has no bias, norm, ReLU."""

    def __init__(self, channels_in: int, channels: int, kernel: int, norm: Norm) -> None:
        super().__init__(
            nn.Conv2d(channels_in, channels, kernel, padding=kernel // 2, bias=False),
            make_norm(norm, channels),
            nn.ReLU(inplace=True),
        )


class Classifier(nn.Sequential):
    """Dropout of whole channels, then a 1x1 convolution with weights from N(0, 0.01)."""

    def __init__(self, channels: int, num_classes: int, dropout: float, bias: bool = True) -> None:
        conv = nn.Conv2d(channels, num_classes, 1, bias=bias)
        nn.init.normal_(conv.weight, std=0.01)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        super().__init__(nn.Dropout2d(dropout), conv)


def pool(maps: Tensor, size: int) -> Tensor:
    """`adaptive_avg_pool2d` to size x size, as two matrix products.

    These export with sizes that are known at run time only, and have deterministic gradients on
    CUDA; torch's own has neither.
    """
    rows = _cells(size, maps.shape[-2], maps)
    columns = _cells(size, maps.shape[-1], maps)
    return rows @ maps @ columns.T


def _cells(size: int, length: int, like: Tensor) -> Tensor:
    """[size, length]: each row averages the positions of one cell."""
    cells = torch.arange(size, device=like.device)[:, None]
    positions = torch.arange(length, device=like.device)
    # Cells overlap where the length is no multiple: from the floor to the ceiling.
    inside = (positions >= cells * length // size) & (
        positions < ((cells + 1) * length + size - 1) // size
    )
    weights = inside.to(like.dtype)
    return weights / weights.sum(dim=1, keepdim=True)
