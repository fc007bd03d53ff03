"""Losses of semantic maps, summed; those of overlaps are segmentation_models_pytorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitdense.losses.divisors import divisor
from vitdense.losses.pixels import balance, boundary, hard_cross_entropy, pixel_weight
from vitdense.registry import suggest
from vitdense.structures import IGNORE, Target

ENTROPIES = ("cross_entropy", "ohem")
"""The losses that take class weights."""

NAMES = (*ENTROPIES, "dice", "focal", "lovasz", "tversky", "boundary")
"""What `DenseLoss` can sum."""

ClassWeights = list[float] | Literal["inverse", "median"]


class DenseLoss(nn.Module):
    """A weighted sum of per-pixel and overlap losses that skips ignored pixels.

    - `cross_entropy`: mean over the pixels that count, as in torch.
    - `ohem`: the same over the hard pixels only (see `hard_cross_entropy`).
    - `dice`: 1 - Dice over the batch, mean over all classes (V-Net, arXiv 1606.04797).
    - `focal`: one against all, gamma 2, mean over classes (RetinaNet, arXiv 1708.02002).
    - `lovasz`: Lovasz-softmax over the classes present (arXiv 1705.08790).
    - `tversky`: Dice that weighs false alarms 0.3 and misses 0.7 (arXiv 1706.05721).
    - `boundary`: 1 - F1 of the outlines (arXiv 1905.07852).

    Args:
        num_classes: classes 0..num_classes-1.
        losses: weight of each by name; by default cross entropy alone.
        class_weights: one per class, for the entropies; `inverse` and `median` are computed from
            how often the data has each class, which `set_frequencies` must then be told.
        label_smoothing: 0..1, for the cross entropy.

    Attributes:
        balanced: `inverse` or `median` if class weights are computed from the data, else None.

    Raises:
        ValueError: a name is unknown, class weights are not one per class, or no loss takes them.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        num_classes: int,
        losses: dict[str, float] | None = None,
        class_weights: ClassWeights | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.losses = {"cross_entropy": 1.0} if losses is None else dict(losses)
        self.label_smoothing = label_smoothing
        self._check(num_classes, class_weights)
        self.balanced = class_weights if isinstance(class_weights, str) else None
        weights = None
        if class_weights is not None:
            given = [1.0] * num_classes if isinstance(class_weights, str) else class_weights
            weights = torch.tensor(given, dtype=torch.float)
        # Not persistent: the config or the data owns them.
        self.register_buffer("class_weights", weights, persistent=False)
        self.overlaps = _overlap_losses() if self.losses.keys() - {*ENTROPIES, "boundary"} else {}

    def set_frequencies(self, pixels: Tensor, shared: Tensor) -> None:
        """Compute class weights that follow from the data; the arguments are those of `balance`."""
        if self.balanced is not None and self.class_weights is not None:
            self.class_weights.copy_(balance(pixels, shared, self.balanced == "median"))

    def _check(self, num_classes: int, class_weights: ClassWeights | None) -> None:
        if not self.losses:
            raise ValueError(f"losses: names no loss; known: {', '.join(NAMES)}")
        for name in self.losses:
            if name not in NAMES:
                known = ", ".join(NAMES)
                raise ValueError(f"losses: no {name!r}.{suggest(name, NAMES)} Known: {known}")
        if isinstance(class_weights, list) and len(class_weights) != num_classes:
            raise ValueError(
                f"class_weights: has {len(class_weights)} numbers, the data {num_classes} classes"
            )
        if isinstance(class_weights, list) and not any(class_weights):
            raise ValueError("class_weights: all are 0, so that nothing would be learnt")
        for option, value, users in (
            ("class_weights", class_weights, ENTROPIES),
            ("label_smoothing", self.label_smoothing, ENTROPIES[:1]),
        ):
            if value and not self.losses.keys() & set(users):
                raise ValueError(
                    f"{option}: is for `{'` and `'.join(users)}`, which `losses` does not name"
                )

    def forward(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The weighted terms by name; zeros that are part of the graph if all is ignored.

        Args:
            logits: float [B, C, H, W].
            labels: int64 [B, H, W], 0..C-1 or IGNORE.
        """
        return {
            name: weight * self._term(name, logits, labels) for name, weight in self.losses.items()
        }

    def _term(self, name: str, logits: Tensor, labels: Tensor) -> Tensor:
        if name == "cross_entropy":
            return self._cross_entropy(logits, labels)
        if name == "ohem":
            return hard_cross_entropy(logits, labels, self.class_weights)
        if name == "boundary":
            return boundary(logits, labels)
        logits = logits.float()  # Lovasz mixes it with the type of the logits
        pixels = pixel_weight(labels)
        # smp's focal is a mean over these pixels; the others see a batch as a whole
        scale = pixels / divisor(pixels, _pixels, logits) if name == "focal" else 1
        # Here focal is NaN and Lovasz fails. The sync costs nothing: they index by masks anyway.
        if not pixels:
            return logits.sum() * 0
        return scale * self.overlaps[name](logits, labels)

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        total = F.cross_entropy(
            logits,
            labels,
            None if self.class_weights is None else self.class_weights.to(logits.dtype),
            ignore_index=IGNORE,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        return total / divisor(pixel_weight(labels, self.class_weights), self._weight, logits)

    def _weight(self, target: Target) -> Tensor:
        """Of an image's pixels in the cross entropy."""
        return _pixels(target, self.class_weights)


def _pixels(target: Target, class_weights: Tensor | None = None) -> Tensor:
    assert target.semantic is not None
    device = None if class_weights is None else class_weights.device
    return pixel_weight(target.semantic.to(device, non_blocking=True), class_weights)


def _overlap_losses() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    from segmentation_models_pytorch import losses

    options: dict[str, Any] = {"mode": losses.MULTICLASS_MODE, "ignore_index": IGNORE}
    return {
        "dice": losses.DiceLoss(**options),
        "focal": losses.FocalLoss(**options),
        "lovasz": losses.LovaszLoss(**options),
        "tversky": losses.TverskyLoss(**options, alpha=0.3, beta=0.7),
    }
