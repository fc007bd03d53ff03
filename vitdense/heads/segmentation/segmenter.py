"""Segmenter: class embeddings go through transformer blocks with the patches of a plain ViT."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from vitdense.heads.segmentation.base import SemanticHead, SemanticOutputs
from vitdense.layers.attention import check_heads
from vitdense.registry import HEADS, Fraction
from vitdense.structures import Level, Target


@HEADS.register("segmenter")
class SegmenterHead(SemanticHead):
    """The mask transformer of Segmenter (Strudel et al. 2021, arXiv 2105.05633, section 3.2).

    Reads the last level alone, which should be that of a plain ViT with its final norm: set
    `neck: none`. A class's mask is the cosine of its embedding and every patch's; a layer norm then
    goes over the classes of each patch.

    Raises:
        ValueError: `heads` does not divide the width.
    """

    def __init__(
        self,
        levels: list[Level],
        num_classes: int,
        *,
        layers: PositiveInt = 2,  # transformer blocks
        width: PositiveInt | None = None,  # of the decoder; null = the backbone's
        heads: PositiveInt | None = None,  # of each attention; null = one per 64 of width
        dropout: Fraction = 0.1,  # in attention and MLPs
        drop_path: Fraction = 0.0,  # stochastic depth of the last block; it grows linearly
        losses: dict[str, PositiveFloat] | None = None,  # weights by name; null = cross_entropy
        class_weights: list[NonNegativeFloat]
        | Literal["inverse", "median"]
        | None = None,  # for the entropies: one per class, or by how rare they are
        label_smoothing: Fraction = 0.0,  # for the cross entropy
    ) -> None:
        super().__init__(levels, num_classes, losses, class_weights, label_smoothing)
        channels = levels[-1].channels
        width = width or channels
        heads = check_heads(width, heads or max(1, width // 64))
        self.embed = nn.Linear(channels, width)
        self.classes = nn.Parameter(torch.empty(1, num_classes, width))
        self.blocks = _blocks(layers, width, heads, dropout, drop_path)
        self.norm = nn.LayerNorm(width)
        self.patch_projection = nn.Parameter(width**-0.5 * torch.randn(width, width))
        self.class_projection = nn.Parameter(width**-0.5 * torch.randn(width, width))
        self.mask_norm = nn.LayerNorm(num_classes)
        nn.init.trunc_normal_(self.classes, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self, features: list[Tensor], targets: list[Target] | None = None
    ) -> SemanticOutputs:
        """Logits at the stride of the last level."""
        height, width = features[-1].shape[-2:]
        patches = self.embed(features[-1].flatten(2).transpose(1, 2))
        tokens = torch.cat([patches, self.classes.expand(len(patches), -1, -1)], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        patches, classes = self.norm(tokens).split([height * width, self.num_classes], dim=1)
        patches = F.normalize(patches @ self.patch_projection, dim=-1)
        classes = F.normalize(classes @ self.class_projection, dim=-1)
        masks = self.mask_norm(patches @ classes.transpose(1, 2))
        return SemanticOutputs(masks.transpose(1, 2).unflatten(2, (height, width)))


def _blocks(layers: int, width: int, heads: int, dropout: float, drop_path: float) -> nn.ModuleList:
    """A ViT's blocks, as Segmenter has them."""
    from timm.models.vision_transformer import Block

    rates = [drop_path * index / max(1, layers - 1) for index in range(layers)]
    return nn.ModuleList(
        Block(
            width,
            heads,
            qkv_bias=True,
            proj_drop=dropout,
            attn_drop=dropout,
            drop_path=rate,
            norm_layer=nn.LayerNorm,
        )
        for rate in rates
    )
