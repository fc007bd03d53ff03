"""Norms of feature maps."""

from __future__ import annotations

from typing import Literal

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitdense.ops.processes import world_size

Norm = Literal["auto", "batch", "sync", "group", "layer"]
"""See `make_norm`."""


def make_norm(kind: Norm, channels: int) -> nn.Module:
    """A norm for maps [B, channels, H, W] that also trains on one image pooled to one pixel.

    - `auto`: `sync` where several GPUs train, else `batch`.
    - `batch`, `sync`: batch norm; a map of one value per channel is normalised as in evaluation.
    - `group`: at most 32 groups of at least 8 channels (arXiv 1803.08494).
    - `layer`: over the channels of each pixel.
    """
    if kind == "auto":
        kind = "sync" if world_size() > 1 and "nccl" in dist.get_backend() else "batch"
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
    """Batch norm that normalises a single value per channel by its running statistics."""

    def forward(self, input: Tensor) -> Tensor:
        """float [B, C, H, W] -> the same."""
        return _normalize(self, input)


class SyncBatchNorm(nn.SyncBatchNorm):
    """The same, synchronised: several processes together have more than one value."""

    def forward(self, input: Tensor) -> Tensor:
        """float [B, C, H, W] -> the same."""
        return super().forward(input) if world_size() > 1 else _normalize(self, input)


def _normalize(norm: _BatchNorm, maps: Tensor) -> Tensor:
    """Batch norm of this process; a single value per channel is normalised as in evaluation."""
    if norm.training and maps.numel() == norm.num_features:
        statistics = norm.running_mean, norm.running_var
        return F.batch_norm(maps, *statistics, norm.weight, norm.bias, eps=norm.eps)
    return _BatchNorm.forward(norm, maps)
