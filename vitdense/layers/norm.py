"""Norms of feature maps."""

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
