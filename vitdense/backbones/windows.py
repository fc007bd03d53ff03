"""Windowed attention for plain vision transformers: most blocks see a window, a few the image.

As in ViTDet (Li et al., 2203.16527, section 3) and the windowed DINOv2 of RF-DETR. Tokens are
sorted by window once, before the first block. For a windowed block windows are items of the batch,
for a global block they are joined to one sequence, so that no token moves between blocks. Positions
are those of the whole image. Every window has its own copy of class and register tokens; in a
global block all copies take part, as in RF-DETR.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.models import checkpoint
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vitdense.backbones.survey import Survey, round_up
from vitdense.structures import Size


@dataclass(frozen=True)
class Windows:
    """How to cut the grid of patches.

    Attributes:
        stride: side of a patch in pixels.
        count: windows along each side; None if `size` is given.
        size: longest side of a window in patches; the map is cut into as few equal windows as fit.
        global_blocks: indices of the blocks that attend to all windows.
    """

    stride: int
    count: int | None
    size: int | None
    global_blocks: frozenset[int]

    def split(self, canvas: Size) -> Size:
        """Windows along height and width of a canvas in pixels."""
        if self.size is None:
            return self.count or 1, self.count or 1
        side = self.stride * self.size
        return math.ceil(canvas[0] / side), math.ceil(canvas[1] / side)

    def fit(self, canvas: Size) -> Size:
        """The smallest canvas that holds `canvas` and is cut into equal windows."""
        rows, columns = self.split(canvas)
        return round_up(canvas, (rows * self.stride, columns * self.stride))

    def forward_intermediates(self, model: Any, images: Tensor, indices: list[int]) -> list[Tensor]:
        """Maps after the blocks at `indices`, as timm's method of this name gives them.

        Args:
            model: one that `prepare` has accepted.
            images: float [B, C, H, W] of a size that `fit` gives.

        Returns:
            float [B, width, H / stride, W / stride] for each index, in ascending order.
        """
        canvas = (images.shape[-2], images.shape[-1])
        grid, split = (canvas[0] // self.stride, canvas[1] // self.stride), self.split(canvas)
        tokens, rope = embed(model, images)
        prefix = model.num_prefix_tokens
        patches = partition(tokens[:, prefix:], grid, split)
        repeated = tokens[:, None, :prefix].expand(-1, patches.shape[1], -1, -1)
        tokens = torch.cat((repeated, patches), 2)
        rotations = _Rotations(rope, prefix, grid, split, batch=len(images))
        maps = []
        for index, block in enumerate(model.blocks):
            run: Any = partial(checkpoint, block) if model.grad_checkpointing else block
            whole = index in self.global_blocks
            sequences = tokens.flatten(1, 2) if whole else tokens.flatten(0, 1)
            tokens = run(sequences, **rotations.of_block(index, whole)).reshape(tokens.shape)
            if index in indices:
                maps.append(_map(tokens[:, :, prefix:], grid, split))
        return maps


def prepare(
    model: Any, survey: Survey, count: int | None, size: int | None, blocks: list[int] | None
) -> Windows | None:
    """What the options `windows`, `window_size` and `global_blocks` ask of a timm model.

    Args:
        model: without the blocks that no map needs. Its rotary attention is changed to rotate
            prefix tokens too (by the identity, see `_Rotations`).
        survey: of the whole model.

    Raises:
        ValueError: the options contradict each other, or the family cannot be cut into windows.
    """
    if count is None and size is None:
        if blocks is not None:
            raise ValueError("global_blocks: say `windows` or `window_size` too")
        return None
    if count is not None and size is not None:
        raise ValueError("window_size: say either how many `windows` or how large, not both")
    if not isinstance(model, VisionTransformer | Eva) or survey.canvas.fixed:
        option = "windows" if size is None else "window_size"
        raise ValueError(
            f"{option}: {survey.canvas.model} cannot be cut into windows; plain ViTs that take "
            "images of any size can: vit_*, flexivit_*, deit*, eva*, with registers or rotary too"
        )
    depth = len(survey.levels)
    if outside := [index for index in blocks or [] if not 0 <= index < depth]:
        raise ValueError(f"global_blocks: {outside} are not in 0..{depth - 1}")
    if getattr(model, "rope", None) is not None:
        for block in model.blocks.children():
            attention: Any = block.attn
            attention.num_prefix_tokens = 0  # rotated by the identity instead, see _Rotations
    chosen = spread(len(model.blocks)) if blocks is None else blocks
    return Windows(int(survey.levels[-1].stride), count, size, frozenset(chosen))


def spread(depth: int) -> list[int]:
    """Global blocks by default: the last of each of four equal parts, fewer where depth < 12."""
    parts = max(1, min(4, depth // 3))
    return [round(depth * part / parts) - 1 for part in range(1, parts + 1)]


def partition(tokens: Tensor, grid: Size, split: Size) -> Tensor:
    """[..., rows * columns, C] in row-major order -> [..., windows, tokens of a window, C]."""
    (rows, columns), (down, across) = grid, split
    tokens = tokens.unflatten(-2, (down, rows // down, across, columns // across))
    return tokens.transpose(-4, -3).flatten(-3, -2).flatten(-4, -3)


class _Rotations:
    """Rotary positions for windows of tokens, class and register tokens included.

    In a global block prefix tokens lie between the patches, while timm expects them before all
    patches. So they are rotated too, by the identity (sine 0, cosine 1).
    """

    def __init__(
        self, rope: Tensor | None, prefix: int, grid: Size, split: Size, batch: int
    ) -> None:
        self.rope = rope  # [rows * columns, 2 D] for all blocks, or [blocks, heads, ..., 2 D]
        if rope is None:
            return
        windows = partition(rope, grid, split)
        unmoved = torch.zeros_like(windows[..., :1, :])
        unmoved[..., unmoved.shape[-1] // 2 :] = 1
        self.windows = torch.cat((unmoved.expand(*windows.shape[:-2], prefix, -1), windows), -2)
        self.batch = batch
        if rope.dim() == 2:
            self.local, self.whole = self._local(self.windows), self.windows.flatten(0, 1)

    def of_block(self, index: int, whole: bool) -> dict[str, Tensor]:
        """Keyword arguments for a block."""
        if self.rope is None:
            return {}
        if self.rope.dim() == 2:
            return {"rope": self.whole if whole else self.local}
        windows = self.windows[index]
        return {"rope": windows.flatten(-3, -2) if whole else self._local(windows)}

    def _local(self, windows: Tensor) -> Tensor:
        """[(heads,) windows, tokens, 2 D] -> [batch * windows, 1 or heads, tokens, 2 D]."""
        by_window = windows.unsqueeze(1) if windows.dim() == 3 else windows.transpose(0, 1)
        return by_window.repeat(self.batch, 1, 1, 1)


def embed(model: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Tokens [B, prefix + rows * columns, C] with position embeddings; rotary ones, if any."""
    tokens, rope = model.patch_embed(images), None
    if isinstance(model, Eva):
        tokens, rope = model._pos_embed(tokens)
    else:
        tokens = model.patch_drop(model._pos_embed(tokens))
    return model.norm_pre(tokens), rope


def _map(windows: Tensor, grid: Size, split: Size) -> Tensor:
    """[B, windows, tokens of a window, C] -> [B, C, rows, columns]."""
    (rows, columns), (down, across) = grid, split
    cells = windows.unflatten(2, (rows // down, -1)).unflatten(1, (down, across))
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(len(windows), -1, rows, columns)
