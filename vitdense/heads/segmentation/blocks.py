"""Layers that the semantic heads share."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["auto", "batch", "sync", "group", "layer"]
"""`auto` is batch norm, synchronised where several GPUs train; see `make_norm`."""


def make_norm(kind: Norm, channels: int) -> nn.Module:
    """A norm for maps [B, channels, H, W] that also trains on one image pooled to one pixel.

    `batch` and `sync` normalise such a map as in evaluation; `group` has groups of at least 8
    channels, at most 32 of them (arXiv 1803.08494); `layer` is over the channels of each pixel.
    """
    if kind == "auto":
        kind = "sync" if torch.cuda.is_available() and _world_size() > 1 else "batch"
    if kind == "batch":
        return BatchNorm(channels)
    if kind == "sync":
        return SyncBatchNorm(channels)
    if kind == "group":
        counts = range(1, min(32, max(1, channels // 8)) + 1)
        return nn.GroupNorm(max(n for n in counts if channels % n == 0), channels)
    if kind == "layer":
        from timm.layers import LayerNorm2d

        return LayerNorm2d(channels)
    raise ValueError(f"norm: is {kind!r}, not one of auto, batch, sync, group, layer")


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that leaves a single value per channel to the running statistics."""

    def forward(self, input: Tensor) -> Tensor:
        """float [B, C, H, W] -> the same."""
        if self.training and input.numel() == self.num_features:
            return _normalize_as_in_evaluation(self, input)
        return super().forward(input)


class SyncBatchNorm(nn.SyncBatchNorm):
    """The same over all processes, which together have more values."""

    def forward(self, input: Tensor) -> Tensor:
        """float [B, C, H, W] -> the same."""
        if self.training and input.numel() == self.num_features and _world_size() == 1:
            return _normalize_as_in_evaluation(self, input)
        return super().forward(input)


def _normalize_as_in_evaluation(norm: nn.BatchNorm2d | nn.SyncBatchNorm, maps: Tensor) -> Tensor:
    return F.batch_norm(
        maps, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )


def _world_size() -> int:
    distributed = torch.distributed
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


class ConvNorm(nn.Sequential):
    """Convolution of the same size without bias, norm, ReLU."""

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

    They export with sizes that are only known at run time, and their gradients are deterministic
    on CUDA.
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
