"""Linear layers that use the faster of two libraries on CPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_MULTIPLICATIONS = 2**23
"""Of a product that is worth the time that oneDNN takes to start."""

MIN_FEATURES = 16
"""Of the input; oneDNN is slow below."""

DILATION = 2
"""Of 1x1 convolutions: changes no result, but without it PyTorch on one thread runs them by MKL."""


class Linear(nn.Linear):
    """A linear layer that runs as a 1x1 convolution where that is faster: large products on CPUs.

    PyTorch multiplies float32 matrices by MKL but convolves by oneDNN, which takes half as long on
    AMD's processors.
    """

    def forward(self, input: Tensor) -> Tensor:
        """float [..., in_features] -> [..., out_features]."""
        # asked first: compiled code would be bound to the sizes that are compared behind it
        if (
            not onednn_is_faster(input)
            or self.in_features < MIN_FEATURES
            or input.numel() * self.out_features < MIN_MULTIPLICATIONS
        ):
            return F.linear(input, self.weight, self.bias)
        rows = input.reshape(1, -1, 1, self.in_features).permute(0, 3, 1, 2)
        weight = self.weight[:, :, None, None]
        products = F.conv2d(rows, weight, self.bias, dilation=DILATION)
        return products.permute(0, 2, 3, 1).reshape(*input.shape[:-1], -1)


def onednn_is_faster(x: Tensor) -> bool:
    """Whether 1x1 convolutions with `DILATION` beat matrix products: in float32 on a CPU."""
    return (
        not torch.compiler.is_compiling()  # is_available() below would break the graph
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )
