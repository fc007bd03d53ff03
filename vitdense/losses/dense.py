"""Losses of semantic maps: cross entropy here, the others from segmentation_models_pytorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitdense.registry import suggest
from vitdense.structures import IGNORE

NAMES = ("cross_entropy", "dice", "focal", "lovasz", "tversky")
"""What `DenseLoss` can sum."""


class DenseLoss(nn.Module):
    """A weighted sum of per-pixel and overlap losses that skips ignored pixels.

    - `cross_entropy`: mean over the pixels that count, as in torch.
    - `dice`: 1 - Dice over the batch, mean over all classes (V-Net, arXiv 1606.04797).
    - `focal`: one against all, gamma 2, mean over classes (RetinaNet, arXiv 1708.02002).
    - `lovasz`: Lovasz-softmax over the classes present (arXiv 1705.08790).
    - `tversky`: Dice that weighs false alarms 0.3 and misses 0.7 (arXiv 1706.05721).

    Args:
        num_classes: classes 0..num_classes-1.
        losses: weight of each by name; by default cross entropy alone.
        class_weights: one per class, for the cross entropy.
        label_smoothing: 0..1, for the cross entropy.

    Raises:
        ValueError: a name is unknown, or an option fits neither the classes nor the losses.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        num_classes: int,
        losses: dict[str, float] | None = None,
        class_weights: list[float] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.losses = {"cross_entropy": 1.0} if losses is None else dict(losses)
        self.label_smoothing = label_smoothing
        self._check(num_classes, class_weights)
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float)
        # Not persistent: the config owns them.
        self.register_buffer("class_weights", weights, persistent=False)
        self.overlaps = _overlap_losses() if self.losses.keys() - {"cross_entropy"} else {}

    def _check(self, num_classes: int, class_weights: list[float] | None) -> None:
        if not self.losses:
            raise ValueError(f"losses: names no loss; known: {', '.join(NAMES)}")
        for name in self.losses:
            if name not in NAMES:
                known = ", ".join(NAMES)
                raise ValueError(f"losses: no {name!r}.{suggest(name, NAMES)} Known: {known}")
        if class_weights is not None and len(class_weights) != num_classes:
            raise ValueError(
                f"class_weights: has {len(class_weights)} numbers, the data {num_classes} classes"
            )
        for option, value in (
            ("class_weights", class_weights),
            ("label_smoothing", self.label_smoothing),
        ):
            if value and "cross_entropy" not in self.losses:
                raise ValueError(f"{option}: is for `cross_entropy`, which `losses` does not name")

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
            return cross_entropy(logits, labels, self.class_weights, self.label_smoothing)
        # Here focal is NaN and Lovasz fails. The sync costs nothing: they index by masks anyway.
        if not (labels != IGNORE).any():
            return logits.sum() * 0
        # In float32, because Lovasz mixes it with the type of the logits.
        return self.overlaps[name](logits.float(), labels)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """torch's mean cross entropy over the pixels that count; zero instead of NaN if none does.

    Args:
        logits: float [B, C, H, W].
        labels: int64 [B, H, W], 0..C-1 or IGNORE.
        class_weights: float [C].
        label_smoothing: 0..1.
    """
    valid = labels != IGNORE
    if class_weights is None:
        divisor = valid.sum()
    else:
        class_weights = class_weights.to(logits.dtype)
        divisor = (class_weights[labels.where(valid, 0)] * valid).sum()
    total = F.cross_entropy(
        logits,
        labels,
        class_weights,
        ignore_index=IGNORE,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return total / divisor.where(divisor > 0, 1)


def _overlap_losses() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    from segmentation_models_pytorch import losses

    options: dict[str, Any] = {"mode": losses.MULTICLASS_MODE, "ignore_index": IGNORE}
    return {
        "dice": losses.DiceLoss(**options),
        "focal": losses.FocalLoss(**options),
        "lovasz": losses.LovaszLoss(**options),
        "tversky": losses.TverskyLoss(**options, alpha=0.3, beta=0.7),
    }
