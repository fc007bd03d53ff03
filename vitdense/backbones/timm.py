"""Every timm family as a backbone."""

from __future__ import annotations

import inspect
import math
import re
from fnmatch import fnmatch
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from vitdense.backbones.base import Backbone
from vitdense.backbones.survey import Survey
from vitdense.registry import BACKBONES, Fraction
from vitdense.structures import Level

POSITIONS = re.compile(r"pos_embed|rel_pos|relative_position|attention_bias|rope|token")
"""Names of parameters that are position embeddings or prefix tokens."""


@BACKBONES.register("timm")
class TimmBackbone(Backbone):
    """Any timm model: plain and hierarchical vision transformers, and convolutional nets.

    Images of any size are padded with zeros on the right and at the bottom to what the family
    takes, and the maps are cropped back. Position embeddings are interpolated where the family
    does so; a family of one fixed size is built for `img_size`, and smaller images are padded to
    it. docs/backbones.md says which family takes what.

    Raises:
        ValueError: timm does not know the model, it cannot serve as a backbone or not with these
            options, or its weights cannot be had.
    """

    model: Any  # timm's; its families share methods, but no typed base

    def __init__(
        self,
        *,
        model: str,  # a name of timm, with or without a tag of weights: vit_base_patch16_224.mae
        pretrained: bool = False,  # weights from timm's hub or its cache
        weights: str | None = None,  # local .pth or .safetensors file; goes before `pretrained`
        img_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None,  # size to build for
        patch_size: PositiveInt | None = None,  # other patches than the name's; weights resampled
        in_chans: PositiveInt = 3,  # channels of the images; weights for RGB are adapted
        out_indices: list[int] | None = None,  # maps to give: 4 blocks of a ViT, else stride >= 4
        drop_path: Fraction = 0.0,  # stochastic depth of the last block; it grows linearly
        frozen: bool | NonNegativeInt = False,  # true: all; n: the stem and the first n blocks
        frozen_norms: bool = False,  # batch norms keep their statistics and weights, as in DETR
        checkpointing: bool = False,  # recompute activations in backward: less memory, more time
        windows: PositiveInt | None = None,  # cut the map into so many windows along each side
        window_size: PositiveInt | None = None,  # or into equal windows of at most so many patches
        global_blocks: list[int] | None = None,  # see all windows; by default 2, 5, 8, 11 of 12
        norm: bool | Literal["all"] | None = None,  # final norm: last map or all; plain ViTs: true
        level_norm: bool = False,  # a new LayerNorm on each map: Swin's and ConvNeXt's recipes
        class_token: Literal["drop", "add", "concat"] = "drop",  # of plain ViTs, on every patch
        pad_before_roll: bool = True,  # Swin's windows as in the original code, not as in timm's
        mean: list[float] | None = None,  # of pixels in 0..1; by default what the weights expect
        std: list[float] | None = None,  # of pixels in 0..1; by default what the weights expect
        options: dict[str, Any] | None = None,  # more arguments of timm's constructor: {depth: 4}
    ) -> None:
        super().__init__()
        from vitdense.backbones import creation, plan
        from vitdense.backbones.windows import prepare

        size = (img_size, img_size) if isinstance(img_size, int) else img_size
        arguments, survey = plan.make_plan(
            model, size, patch_size, in_chans, drop_path, pad_before_roll, options or {}
        )
        self.name, self.in_chans, self.canvas = model, in_chans, survey.canvas
        self.indices = choose_indices(survey, out_indices)
        self.levels = [survey.levels[index] for index in self.indices]
        self.model = creation.create(model, arguments, pretrained=pretrained, weights=weights)
        self.layout = creation.best_layout(self.model)
        self.model.to(memory_format=self.layout)
        if frozen_norms:
            self.model = creation.freeze_norms(self.model, model)
        if pad_before_roll:
            from vitdense.backbones import swin

            swin.pad_before_roll(self.model)
        self.mean, self.std = _pixel_statistics(self.model, mean, std, in_chans)
        self.normed = self._prune(norm, default=survey.is_plain and not level_norm)
        self.windows = prepare(self.model, survey, windows, window_size, global_blocks)
        self.class_token, self.token_channels = class_token, self._token_channels()
        if class_token != "drop":
            self._take_class_token()
        self.level_norms = _level_norms(self.levels, self.model) if level_norm else None
        if checkpointing:
            self._checkpoint()
        if frozen is not False:
            self._freeze(frozen)

    def forward(self, images: Tensor) -> list[Tensor]:
        """float [B, in_chans, H, W] -> float [B, channels, ceil(H / stride), ceil(W / stride)]s.

        Raises:
            ValueError: the model has a fixed input size that is smaller than the images.
        """
        return self._compute(images, with_token=self.class_token != "drop")[0]

    def forward_with_token(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        maps, token = self._compute(images, with_token=True)
        assert token is not None
        return maps, token

    def _compute(self, images: Tensor, with_token: bool) -> tuple[list[Tensor], Tensor | None]:
        height, width = images.shape[-2:]
        canvas = self.canvas.fit((height, width))
        if self.windows is not None:
            canvas = self.windows.fit(canvas)
        padded = F.pad(images, (0, canvas[1] - width, 0, canvas[0] - height))
        parts = self._parts(padded.contiguous(memory_format=self.layout), with_token)
        maps = [
            feature[..., : math.ceil(height / level.stride), : math.ceil(width / level.stride)]
            for feature, level in zip(map(self._join, parts), self.levels, strict=True)
        ]
        if self.level_norms is not None:
            maps = [norm(feature) for norm, feature in zip(self.level_norms, maps, strict=True)]
        return maps, parts[-1][1].flatten(1) if with_token else None

    def train(self, mode: bool = True) -> Self:
        """Set the mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        for module in self.model.modules():
            if _is_frozen(module):
                module.eval()
        return self

    def layer_depths(self) -> dict[str, int]:
        """Depth of each parameter by name: 0 = stem and positions, then one per block."""
        from timm.models import group_parameters

        if not hasattr(self.model, "group_matcher"):
            return {}
        matcher = self.model.group_matcher(coarse=False)
        depths = group_parameters(self.model, matcher, reverse=True)
        last = max(depths.values())
        for name in depths:
            if POSITIONS.search(name) and not re.search(r"\d", name):  # shared by all blocks
                depths[name] = 0
        named = {f"model.{name}": depth for name, depth in depths.items()}
        return {name: named.get(name, last) for name, _ in self.named_parameters()}

    def no_weight_decay(self) -> set[str]:
        """What timm exempts, position embeddings and tables of relative positions."""
        exempt = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else set()
        return {
            f"model.{name}"
            for name, _ in self.model.named_parameters()
            if POSITIONS.search(name) or any(fnmatch(name, pattern) for pattern in exempt)
        }

    def _parts(self, padded: Tensor, with_token: bool) -> list[list[Tensor]]:
        """timm's maps of padded images, the final norm applied where wanted, and class tokens."""
        parts = self._intermediates(padded, with_token)
        for index in range(len(parts) - self.normed, len(parts)):
            parts[index] = [_normed(self.model.norm, part) for part in parts[index]]
        return parts

    def _join(self, part: list[Tensor]) -> Tensor:
        """A map, with its class token added or concatenated if the option says so."""
        if self.class_token == "drop":
            return part[0]
        map_, token = part
        if self.class_token == "add":
            return map_ + token
        return torch.cat([map_, token.expand_as(map_)], dim=1)

    def _intermediates(self, padded: Tensor, with_token: bool) -> list[list[Tensor]]:
        """The maps [B, C, H, W], each with the class token [B, C, 1, 1] if it is asked for."""
        if self.windows is not None:
            maps = self.windows.forward_intermediates(self.model, padded, self.indices)
            return [[map_] for map_ in maps]
        arguments = {"indices": self.indices, "intermediates_only": True}
        if not with_token:
            return [[map_] for map_ in self.model.forward_intermediates(padded, **arguments)]
        pairs = self.model.forward_intermediates(padded, **arguments, return_prefix_tokens=True)
        return [[map_, prefix[:, 0, :, None, None]] for map_, prefix in pairs]

    def _token_channels(self) -> int:
        """Channels of the class token; 0 if there is none, or one for each window."""
        known = inspect.signature(self.model.forward_intermediates).parameters
        token = getattr(self.model, "cls_token", None)
        given = token is not None and "return_prefix_tokens" in known and self.windows is None
        return self.levels[-1].channels if given else 0

    def _take_class_token(self) -> None:
        """Check that the model has a class token, and adapt the levels to it."""
        if self.windows is not None:
            raise ValueError(
                "class_token: each of the `windows` has its own; leave one of them out"
            )
        if not self.token_channels:
            raise ValueError(f"class_token: {self.name} has none to give")
        if self.class_token == "concat":
            self.levels = [Level(2 * level.channels, level.stride) for level in self.levels]

    def _prune(self, norm: bool | Literal["all"] | None, default: bool) -> int:
        """Drop blocks, head and norm that no map needs; returns how many last maps are normed."""
        final = getattr(self.model, "norm", None)
        weight = getattr(final, "weight", None)
        normed = self.levels if norm == "all" else self.levels[-1:]
        width = len(weight) if isinstance(weight, Tensor) else 0
        usable = all(level.channels == width for level in normed)
        if norm and not usable:
            which = "all its maps" if norm == "all" else "its last map"
            raise ValueError(f"norm: {self.name} has no final norm for {which}")
        count = len(normed) if usable and (default if norm is None else norm) else 0
        self.model.prune_intermediate_layers(self.indices, prune_norm=not count, prune_head=True)
        if count and not isinstance(getattr(self.model.norm, "weight", None), Tensor):
            self.model.norm = final  # pruned with the blocks behind the last map
        return count

    def _checkpoint(self) -> None:
        try:
            self.model.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise ValueError(f"checkpointing: {self.name} has no support for it") from error

    def _freeze(self, frozen: bool | int) -> None:
        """Freeze all layers, or the stem and the first `frozen` blocks."""
        names = {name for name, _ in self.named_parameters() if name.startswith("model.")}
        if frozen is not True:
            depths = self.layer_depths()
            blocks = max(depths.values(), default=0)
            if not depths:
                raise ValueError(f"frozen: timm knows no order of blocks for {self.name}; use true")
            if frozen > blocks:
                raise ValueError(f"frozen: {self.name} has {blocks} blocks in order, not {frozen}")
            names = {name for name in names if depths[name] <= frozen}
        for name, parameter in self.named_parameters():
            if name in names:
                parameter.requires_grad_(False)


def choose_indices(survey: Survey, wanted: list[int] | None) -> list[int]:
    """Which maps to give, in ascending order.

    By default four evenly spaced blocks of a plain ViT (2, 5, 8, 11 of 12), and of other models
    the last map of each stride from 4 on.

    Raises:
        ValueError: an index is out of range.
    """
    count = len(survey.levels)
    if wanted is not None:
        outside = [index for index in wanted if not -count <= index < count]
        if outside or not wanted:
            raise ValueError(f"out_indices: {wanted} must lie in 0..{count - 1}")
        return sorted({index % count for index in wanted})
    if survey.is_plain:
        return sorted({max(0, round(count * part / 4) - 1) for part in (1, 2, 3, 4)})
    last = {level.stride: index for index, level in enumerate(survey.levels)}
    return sorted(index for stride, index in last.items() if stride >= 4)


def _normed(norm: nn.Module, feature: Tensor) -> Tensor:
    """Apply a norm to the channels of [B, C, H, W], whether it expects them second or last."""
    if "2d" in type(norm).__name__:
        return norm(feature)
    return norm(feature.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _level_norms(levels: list[Level], model: nn.Module) -> nn.ModuleList:
    """A layer norm for each level, with the epsilon of the model's (Swin 1e-5, ConvNeXt 1e-6)."""
    from timm.layers import LayerNorm2d

    own = (module.eps for module in model.modules() if isinstance(module, nn.LayerNorm))
    eps = next(own, 1e-5)
    return nn.ModuleList(LayerNorm2d(level.channels, eps=eps) for level in levels)


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def _pixel_statistics(
    model: Any, mean: list[float] | None, std: list[float] | None, in_chans: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel: as given, else what the weights were trained with.

    timm adapts the first layer to other numbers of channels, and the statistics follow: for more
    channels it repeats the weights of RGB, so they repeat too; for one it sums the weights, so they
    are averaged.
    """
    found = []
    for option, given in (("mean", mean), ("std", std)):
        if given is not None and len(given) != in_chans:
            raise ValueError(f"{option}: {len(given)} numbers for {in_chans} channels")
        rgb = model.pretrained_cfg[option]
        usual = [sum(rgb) / 3] if in_chans == 1 else [rgb[i % 3] for i in range(in_chans)]
        found.append(tuple(given or usual))
    return found[0], found[1]
