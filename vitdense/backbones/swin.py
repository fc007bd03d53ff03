"""Swin's windows as in the original code: the map is padded first, then rolled.

timm rolls first. At sizes that are no multiple of the window the padding then lies inside the map,
where the mask does not expect it: at 512 px with window 7 features are off by up to 4 % (timm
issue #2438).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import swin_transformer, swin_transformer_v2
from torch import Tensor, nn

from vitdense.structures import Size


class _PaddedWindows:
    """Mixin for timm's blocks that are built with `always_partition` and a dynamic mask.

    Along an axis where the map is no longer than the window, a block does not shift.
    """

    window_size: Any
    shift_size: Any
    attn: Any

    def _attn(self, x: Tensor) -> Tensor:
        height, width, channels = x.shape[1:]
        (rows, columns), shift = self.window_size, self._shift(height, width)
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        padded = (x.shape[1], x.shape[2])
        x = torch.roll(x, (-shift[0], -shift[1]), (1, 2)) if any(shift) else x
        grid = (-1, padded[0] // rows, padded[1] // columns)
        windows = x.reshape(*grid[:2], rows, grid[2], columns, channels).transpose(2, 3)
        windows = windows.reshape(-1, rows * columns, channels)
        mask = shift_mask(padded, self.window_size, shift, x) if any(shift) else None
        windows = self.attn(windows, mask=mask).view(*grid, rows, columns, channels)
        x = windows.transpose(2, 3).reshape(-1, *padded, channels)
        x = torch.roll(x, shift, (1, 2)) if any(shift) else x
        return x[:, :height, :width].contiguous()

    def _shift(self, height: int, width: int) -> Size:
        (rows, columns), (down, right) = self.window_size, self.shift_size
        return down if height > rows else 0, right if width > columns else 0


class PaddedSwinBlock(_PaddedWindows, swin_transformer.SwinTransformerBlock):
    """timm's Swin block, padding before it rolls."""


class PaddedSwinV2Block(_PaddedWindows, swin_transformer_v2.SwinTransformerV2Block):
    """timm's Swin V2 block, padding before it rolls."""


_PADDED: dict[type[nn.Module], type[nn.Module]] = {
    swin_transformer.SwinTransformerBlock: PaddedSwinBlock,
    swin_transformer_v2.SwinTransformerV2Block: PaddedSwinV2Block,
}


def has_windows(model: nn.Module) -> bool:
    """Whether `pad_before_roll` concerns the model: Swin, Swin-S3 and Swin V2."""
    return any(type(module) in _PADDED for module in model.modules())


def pad_before_roll(model: nn.Module) -> None:
    """Give every Swin block of the model the original order; parameters stay as they are.

    The class is replaced, not a method of the instance, so that copies of the model keep it.
    """
    for module in model.modules():
        if type(module) in _PADDED:
            module.__class__ = _PADDED[type(module)]


def shift_mask(size: Size, window: Size, shift: Size, like: Tensor) -> Tensor:
    """Added to attention logits: -100 between tokens that only rolling made neighbours, else 0.

    Args:
        size: of the padded map, a multiple of `window`.
        like: a tensor of the dtype and device that are wanted.

    Returns:
        [windows, tokens, tokens], windows in row-major order.
    """
    regions = []
    for length, side, step in zip(size, window, shift, strict=True):
        index = torch.arange(length, device=like.device)
        regions.append((index >= length - side).int() + (index >= length - step).int())
    region = regions[0][:, None] * 3 + regions[1]
    region = region.view(size[0] // window[0], window[0], size[1] // window[1], window[1])
    region = region.transpose(1, 2).reshape(-1, window[0] * window[1])
    apart = region[:, :, None] != region[:, None, :]
    return apart.to(like.dtype) * -100.0
