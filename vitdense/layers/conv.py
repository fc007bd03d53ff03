"""Convolutions with norms, which run as one convolution in evaluation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vitdense.layers.linear import DILATION, onednn_is_faster
from vitdense.layers.norm import Norm, make_norm


class Conv(nn.Conv2d):
    """A convolution; on a CPU 1x1 ones are run by oneDNN, as `vitdense.layers.linear` says."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        pointwise = self.kernel_size == (1, 1) and onednn_is_faster(input)
        dilation = DILATION if pointwise else self.dilation
        return F.conv2d(input, weight, bias, self.stride, self.padding, dilation, self.groups)


class ConvNorm(nn.Module):
    """Convolution without bias, norm, and SiLU if `active`; the size is divided by the stride.

    In evaluation batch norm is a scale and a shift per channel. They are folded into the weights on
    each call, which costs little beside the convolution, and needs no second, "deployed" model.
    """

    def __init__(
        self,
        channels_in: int,
        channels: int,
        kernel: int,
        norm: Norm,
        stride: int = 1,
        depthwise: bool = False,
        active: bool = True,
    ) -> None:
        super().__init__()
        groups = channels if depthwise else 1
        padding = (kernel - 1) // 2
        self.conv = Conv(channels_in, channels, kernel, stride, padding, groups=groups, bias=False)
        self.norm = make_norm(norm, channels)
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        """float [B, channels_in, H, W] -> [B, channels, ceil(H / stride), ceil(W / stride)]."""
        if foldable(self.norm):
            x = self.conv._conv_forward(x, *self.folded())
        else:
            x = self.norm(self.conv(x))
        return F.silu(x) if self.active else x

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weights and bias of the one convolution that equals convolution and batch norm."""
        norm: nn.BatchNorm2d = self.norm  # type: ignore[assignment]
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        return self.conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale


class RepBlock(nn.Module):
    """3x3 and 1x1 convolutions side by side, SiLU of their sum (Ding et al. 2021, RepVGG).

    In evaluation with batch norm the two are one 3x3 convolution.
    """

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.wide = ConvNorm(channels, channels, 3, norm, active=False)
        self.point = ConvNorm(channels, channels, 1, norm, active=False)

    def forward(self, x: Tensor) -> Tensor:
        """float [B, C, H, W] -> the same shape."""
        if not foldable(self.wide.norm):
            return F.silu(self.wide(x) + self.point(x))
        (wide, bias), (point, point_bias) = self.wide.folded(), self.point.folded()
        return F.silu(F.conv2d(x, wide + F.pad(point, (1, 1, 1, 1)), bias + point_bias, padding=1))


def foldable(norm: nn.Module) -> bool:
    """Whether a norm is a fixed scale and shift: batch norm in evaluation."""
    return isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm) and not norm.training
