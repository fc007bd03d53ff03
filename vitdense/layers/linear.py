"""Matrix products by the faster of the CPU's two libraries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORTH = 2**23
"""Multiplications from which oneDNN's start costs less than it saves."""

NARROW = 16
"""Features of the input below which oneDNN is slow."""


class Linear(nn.Linear):
    """A linear layer that runs as a 1x1 convolution where that is faster: large ones on a CPU.

    PyTorch multiplies float32 matrices by MKL and convolves by oneDNN, which takes half of the
    time on AMD's processors.
    """

    def forward(self, input: Tensor) -> Tensor:
        """float [..., in_features] -> [..., out_features]."""
        # asked first: code that is compiled would be bound to the sizes that are compared below
        if not onednn_is_faster(input) or self.in_features < NARROW:
            return F.linear(input, self.weight, self.bias)
        if input.numel() * self.out_features < WORTH:
            return F.linear(input, self.weight, self.bias)
        rows = input.reshape(1, -1, 1, self.in_features).permute(0, 3, 1, 2)
        weight = self.weight[:, :, None, None]
        products = F.conv2d(rows, weight, self.bias, dilation=DILATION)
        return products.permute(0, 2, 3, 1).reshape(*input.shape[:-1], -1)


DILATION = 2
"""Of a 1x1 convolution: means nothing to it, but one thread convolves by MKL without."""


def onednn_is_faster(x: Tensor) -> bool:
    """Whether 1x1 convolutions with `DILATION` are: in float32 on a CPU, as PyTorch runs them."""
    return (
        not torch.compiler.is_compiling()  # which stops at the question for the library
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )
