"""The encoder of deformable heads: cells of all levels attend to each other at a few points."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitdense.heads.detection.proposals import cell_centres
from vitdense.layers.position import sine_position
from vitdense.structures import Size


class DeformableEncoder(nn.Module):
    """Layers of deformable attention over the cells of all levels, which may be none.

    Args:
        layers: of the kind `DeformableEncoderLayer`.
        levels, width: of the cells.
        offset, temperature: of the sine positions.
        checkpointing: the backward pass computes layers again instead of keeping activations.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        levels: int,
        width: int,
        *,
        offset: float = -0.5,
        temperature: float = 10000,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        # a parameter that no layer reads would have no gradient
        self.level_embed = nn.Parameter(torch.randn(levels, width)) if self.layers else None
        self.offset, self.temperature = offset, temperature
        self.checkpointing = checkpointing

    def forward(self, memory: Tensor, shapes: list[Size]) -> Tensor:
        """float [B, S, width] -> the same shape."""
        if self.level_embed is None:
            return memory
        centres = cell_centres(shapes, self.level_embed)[None]
        positions = self._positions(shapes, self.level_embed)
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                memory = checkpoint(layer, memory, positions, centres, shapes, use_reentrant=False)
            else:
                memory = layer(memory, positions, centres, shapes)
        return memory

    def _positions(self, shapes: list[Size], level_embed: Tensor) -> Tensor:
        """Position and level of each cell, float [1, S, width].

        In the type of the parameters: under autocast that of the cells is too coarse for angles.
        """
        width = level_embed.shape[-1]
        levels = [
            sine_position(
                *shape, width, offset=self.offset, like=embed, temperature=self.temperature
            )
            + embed
            for shape, embed in zip(shapes, level_embed, strict=True)
        ]
        return torch.cat(levels)[None]
