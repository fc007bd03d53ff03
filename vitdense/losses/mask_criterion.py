"""The loss of mask classification: match queries and masks, then compare class and mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vitdense.losses.classification import SoftmaxLoss
from vitdense.losses.divisors import divisor, objects
from vitdense.losses.mask_truths import MaskTruths, classes_shown
from vitdense.losses.matcher import FAULT, full_precision, match
from vitdense.losses.points import (
    pairwise_bce,
    pairwise_dice,
    point_bce,
    point_dice,
    random_points,
    sample_maps,
    uncertain_points,
)
from vitdense.structures import Target, Task


class MaskCriterion:
    """Cross-entropy of classes; cross-entropy and Dice of masks at points; deep supervision
    (Cheng et al. 2022, Mask2Former, arXiv 2112.01527, section 3.3).

    The terms are also the costs of matching. There masks are compared at uniform points that all
    layers share; in the loss each matched mask is, at points where it is uncertain. All layers are
    matched in one trip to the host. The last layer's terms have plain names, the sum over earlier
    layers ends in `_aux`: the same keys on every step and rank. Void pixels (see `MaskTruths`)
    count nowhere.

    Args:
        class_weight, mask_weight, dice_weight: of the terms, in matching too.
        background: weight of "no object" among the classes.
        points: at which each mask is looked at; never more than its map has cells.
    """

    def __init__(
        self,
        *,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        background: float = 0.1,
        points: int = 12544,
    ) -> None:
        self.class_loss = SoftmaxLoss(background)
        self.weights = {"class": class_weight, "mask": mask_weight, "dice": dice_weight}
        self.points = points

    def __call__(
        self, logits: Tensor, masks: list[Tensor], targets: list[Target], task: Task
    ) -> dict[str, Tensor]:
        """Compute the weighted terms.

        Args:
            logits: float [L, B, Q, C + 1], the last class is "no object".
            masks: L floats [B, Q, h, w], logits over the canvas.
            targets: of each image, what `task` needs, in pixels of the canvas.

        Returns:
            scalars; zeros with a graph for mask terms without any truth.
        """
        truths = MaskTruths.from_targets(targets, task)
        logits = full_precision(logits)
        (matches,) = match([self.cost(logits, masks, truths)], truths)
        losses = {}
        number = classes_shown if task == "semantic" else objects
        for name, layers in self.terms(logits, masks, truths, matches, number).items():
            layers = layers * self.weights[name]
            losses[name] = layers[-1]
            if len(layers) > 1:
                losses[f"{name}_aux"] = layers[:-1].sum()
        return losses

    @torch.no_grad()
    def cost(self, logits: Tensor, masks: list[Tensor], truths: MaskTruths) -> Tensor:
        """Cost of giving each truth to each query of its own image, float [L, B, T, Q], finite."""
        points = random_points(len(truths.counts), self._count(masks[0]), masks[0])
        truth, weight = truths.sample_all(points)
        cost = self.weights["class"] * self.class_loss.cost(logits, truths.labels)
        for layer, maps in zip(cost, masks, strict=True):  # one by one, to spare memory
            found = sample_maps(maps, points)
            layer += self.weights["mask"] * pairwise_bce(found, truth, weight)
            layer += self.weights["dice"] * pairwise_dice(found, truth, weight)
        return cost.nan_to_num(FAULT, FAULT, FAULT)

    def terms(
        self,
        logits: Tensor,
        masks: list[Tensor],
        truths: MaskTruths,
        matches: Tensor,
        number: Callable[[Target], int],
    ) -> dict[str, Tensor]:
        """Unweighted terms of each layer, float [L], for given matches int64 [L, B, T].

        Args:
            number: how many truths an image has, to count those of the step's other batches.
        """
        normalizer = divisor(sum(truths.counts), number, logits)
        images, queries, rows = truths.pairs(matches, logits.shape[2])
        overlaps = torch.zeros_like(matches, dtype=logits.dtype)  # not read by softmax
        found = [
            self._compare(maps[images, chosen], truths, images, row)
            for maps, chosen, row in zip(masks, queries, rows, strict=True)
        ]
        classes = (logits, truths.labels, matches, overlaps, normalizer, number)
        return {
            "class": self.class_loss.loss(*classes),
            "mask": torch.stack([bce for bce, _ in found]) / normalizer,
            "dice": torch.stack([dice for _, dice in found]) / normalizer,
        }

    def _compare(
        self, maps: Tensor, truths: MaskTruths, images: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums of cross-entropy and Dice of matched masks [M, h, w], where they are uncertain."""
        points = uncertain_points(maps, self._count(maps))
        truth, weight = truths.sample(images, rows, points)
        found = sample_maps(maps[:, None], points)[:, 0]
        return point_bce(found, truth, weight).sum(), point_dice(found, truth, weight).sum()

    def _count(self, maps: Tensor) -> int:
        return min(self.points, maps.shape[-2] * maps.shape[-1])
