"""The head of EoMT: queries that live in the backbone, and what is read from them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitdense.heads.segmentation.mask_head import MaskHead, MaskOutputs
from vitdense.layers.linear import Linear
from vitdense.layers.norm import make_norm
from vitdense.structures import Level, Size, Target, Task


class EomtHead(MaskHead):
    """Queries, and their classes and masks after any block of the ViT (2503.19108, section 3).

    The queries run through the last blocks of a ViT together with the patches: `models/eomt.py`.

    Args:
        levels: the patches' one level.
        queries: masks with a class in each image.
        upscale: how often the map of patches is doubled for the masks; None = until its stride is
            4, at least once.
        settings: further arguments of `MaskHead`.
    """

    def __init__(
        self,
        levels: list[Level],
        num_classes: int,
        task: Task,
        queries: int,
        upscale: int | None,
        **settings: Any,
    ) -> None:
        super().__init__(levels, num_classes, task, **settings)
        width, stride = levels[-1].channels, levels[-1].stride
        if upscale is None:
            upscale = max(1, int(math.log2(stride)) - 2)
        self.queries = nn.Embedding(queries, width)
        self.classes = Linear(width, num_classes + 1)
        self.masks = nn.Sequential(
            Linear(width, width), nn.GELU(), Linear(width, width), nn.GELU(), Linear(width, width)
        )
        self.upscale = nn.Sequential(*(Doubling(width) for _ in range(upscale)))

    def forward(self, features: list[Tensor], targets: list[Target] | None = None) -> MaskOutputs:
        """Classes and masks of the queries after any block.

        Args:
            features: queries float [B, Q, C] and patches float [B, C, H, W], both normed.
        """
        queries, patches = features
        height, width = patches.shape[-2:]
        stride = self.levels[-1].stride
        maps = self.upscale(patches)
        masks = (self.masks(queries) @ maps.flatten(2)).unflatten(2, maps.shape[-2:])
        canvas = round(height * stride), round(width * stride)
        return MaskOutputs(self.classes(queries)[None], [masks], canvas)


class Doubling(nn.Module):
    """Twice the size: a transposed convolution, GELU, a depthwise convolution, a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.mix = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = make_norm("layer", width)

    def forward(self, maps: Tensor) -> Tensor:
        """float [B, C, H, W] -> [B, C, 2 H, 2 W]."""
        return self.norm(self.mix(F.gelu(self.expand(maps))))


def attention_bias(masks: Tensor, grid: Size, tokens: Tensor, probability: float) -> Tensor:
    """What is added to the attention so that queries see only the patches of their masks.

    All other attention stays free: of the patches, and between queries and prefix tokens, so that
    no query is left without anything to see.

    Args:
        masks: float [B, Q, h, w], logits.
        grid: rows and columns of the patches.
        tokens: float [B, T, C]: queries first, patches last.
        probability: with which a query is held to its mask.

    Returns:
        [B, 1, T, T] of zeros and, where no attention may be, -inf.
    """
    queries, count = masks.shape[1], tokens.shape[1]
    cells = F.interpolate(masks.detach(), grid, mode="bilinear").flatten(2)
    closed = cells <= 0
    if probability < 1:
        closed &= torch.rand(len(tokens), queries, 1, device=tokens.device) < probability
    bias = tokens.new_zeros(len(tokens), 1, count, count)
    bias[:, 0, :queries, -cells.shape[2] :].masked_fill_(closed, -math.inf)
    return bias
