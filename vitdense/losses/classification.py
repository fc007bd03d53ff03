"""Class losses of set predictors, each with its cost in matching.

Both are in one class because a head that matches by one and trains by another ranks queries in a
way that it is never trained for. Shapes, for L layers, B images, Q queries, C classes, T truths:
logits float [L, B, Q, C]; matches int64 [L, B, T], the query of each truth, -1 for none; labels
int64 [B, T]; overlaps float [L, B, T], the IoU of each truth and its query, without a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vitdense.losses.divisors import divisor, objects
from vitdense.structures import Target


class ClassLoss(Protocol):
    """What the set criterion asks of a class loss."""

    def cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cost of giving each truth to each query, float [L, B, T, Q]."""
        ...

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        matches: Tensor,
        overlaps: Tensor,
        normalizer: Tensor,
        number: Callable[[Target], int] = objects,
    ) -> Tensor:
        """Loss of each layer, float [L].

        Args:
            normalizer: truths of the mean batch of the step, a scalar.
            number: how many truths an image has, to count those of the step's other batches.
        """
        ...


@dataclass(frozen=True)
class QueryWeight:
    """Sum of the weights of an image's queries: `found` for each with a truth, else `others`."""

    number: Callable[[Target], int]
    queries: int
    found: float
    others: float

    def __call__(self, target: Target) -> float:
        found = min(self.number(target), self.queries)
        return self.found * found + self.others * (self.queries - found)


class SoftmaxLoss:
    """Cross-entropy over the classes and, last, "no object" (Carion et al. 2020, DETR).

    The mean over all queries, weighted: "no object" counts `background`, a class counts 1. It is
    not divided by the number of truths.
    """

    def __init__(self, background: float = 0.1) -> None:
        self.background = background

    def cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Minus the probability of the truth's class."""
        return -pick_labels(logits.softmax(-1), labels)

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        matches: Tensor,
        overlaps: Tensor,
        normalizer: Tensor,
        number: Callable[[Target], int] = objects,
    ) -> Tensor:
        """Weighted mean of cross-entropies, float [L]."""
        nothing, queries = logits.shape[-1] - 1, logits.shape[2]
        classes = classes_of_queries(matches, labels, queries, nothing)
        losses = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction="none")
        weights = torch.ones_like(losses).masked_fill(classes.flatten() == nothing, self.background)
        per_layer = (len(logits), -1)
        here = weights.view(per_layer)[0].sum()  # in every layer as many queries have a truth
        total = divisor(here, QueryWeight(number, queries, 1.0, self.background), losses)
        return (losses * weights).view(per_layer).sum(1) / total


class SigmoidLoss:
    """Base of losses on independent classes: a sum divided by the number of truths.

    Almost all entries are negatives, so all are summed as negatives, without a target tensor, and
    the few matched ones are corrected. Queries are matched by the focal cost (alpha 0.25, gamma 2),
    whichever loss trains them.

    Args:
        alpha: a weight; each loss says of what.
        gamma: exponent by which easy negatives count less.
    """

    def __init__(self, alpha: float, gamma: float = 2.0) -> None:
        self.alpha = alpha
        self.gamma = gamma

    def cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Focal loss of the truth's class as a positive minus that as a negative."""
        chosen = pick_labels(logits, labels)
        return _focal(chosen, 0.25, 2.0) - _focal(-chosen, 0.75, 2.0)

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        matches: Tensor,
        overlaps: Tensor,
        normalizer: Tensor,
        number: Callable[[Target], int] = objects,
    ) -> Tensor:
        """Sum over queries and classes, divided by the number of truths, float [L]."""
        entries = matches.clamp(min=0) * logits.shape[-1] + labels
        chosen = logits.flatten(2).gather(2, entries)
        exchange = (self.positive(chosen, overlaps) - self.negative(chosen)) * (matches >= 0)
        return (self.negative(logits).sum((1, 2, 3)) + exchange.sum((1, 2))) / normalizer

    def positive(self, logits: Tensor, overlaps: Tensor) -> Tensor:
        """Loss of entries that are the class of a matched truth."""
        raise NotImplementedError

    def negative(self, logits: Tensor) -> Tensor:
        """Loss of entries whose target is 0."""
        raise NotImplementedError


class FocalLoss(SigmoidLoss):
    """Sigmoid focal loss (Lin et al. 2017); it does not look at overlaps."""

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0) -> None:
        super().__init__(alpha, gamma)

    def cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of the truth's class as a positive minus that as a negative."""
        chosen = pick_labels(logits, labels)
        return self.positive(chosen, chosen) - self.negative(chosen)

    def positive(self, logits: Tensor, overlaps: Tensor) -> Tensor:
        return _focal(logits, self.alpha, self.gamma)

    def negative(self, logits: Tensor) -> Tensor:
        return _focal(-logits, 1 - self.alpha, self.gamma)


class VarifocalLoss(SigmoidLoss):
    """Varifocal loss (Zhang et al. 2021): a match's target is its IoU, which also weighs it."""

    def __init__(self, alpha: float = 0.75, gamma: float = 2.0) -> None:
        super().__init__(alpha, gamma)

    def positive(self, logits: Tensor, overlaps: Tensor) -> Tensor:
        return overlaps * _cross_entropy(logits, overlaps)

    def negative(self, logits: Tensor) -> Tensor:
        # the weight has no gradient, as in the paper's code
        return self.alpha * logits.detach().sigmoid() ** self.gamma * F.softplus(logits)


class MatchabilityLoss(VarifocalLoss):
    """DEIM's loss (Huang et al. 2025): as varifocal, but matches of little overlap count fully.

    The target of a match is IoU ** gamma.
    """

    def __init__(self, alpha: float = 1.0, gamma: float = 1.5) -> None:
        super().__init__(alpha, gamma)

    def positive(self, logits: Tensor, overlaps: Tensor) -> Tensor:
        return _cross_entropy(logits, overlaps**self.gamma)


class IoUAwareLoss(SigmoidLoss):
    """LW-DETR's loss (Chen et al. 2024): the target is p ** alpha * IoU ** (1 - alpha)."""

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0) -> None:
        super().__init__(alpha, gamma)

    def positive(self, logits: Tensor, overlaps: Tensor) -> Tensor:
        scores = logits.detach().sigmoid()
        target = (scores**self.alpha * overlaps ** (1 - self.alpha)).clamp(min=0.01)
        return _cross_entropy(logits, target)

    def negative(self, logits: Tensor) -> Tensor:
        # here the weight has a gradient, as in the authors' code
        return logits.sigmoid() ** self.gamma * F.softplus(logits)


CLASS_LOSSES: dict[str, Callable[[], SigmoidLoss]] = {
    "focal": FocalLoss,
    "varifocal": VarifocalLoss,
    "matchability": MatchabilityLoss,
    "iou_aware": IoUAwareLoss,
}
"""The values of the option `class_loss`."""


def _focal(logits: Tensor, weight: float, gamma: float) -> Tensor:
    """Focal loss of a target of 1; that of a target of 0 is the one of `-logits`."""
    return weight * logits.neg().sigmoid() ** gamma * F.softplus(-logits)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")


def pick_labels(values: Tensor, labels: Tensor) -> Tensor:
    """Values [L, B, Q, C] at the truths' classes [B, T], as [L, B, T, Q]."""
    layers, _, queries, _ = values.shape
    index = labels[None, :, :, None].expand(layers, -1, -1, queries)
    return values.transpose(2, 3).gather(2, index)


def classes_of_queries(matches: Tensor, labels: Tensor, queries: int, nothing: int) -> Tensor:
    """Target class of each query, int64 [L, B, Q]; `nothing` where it has no truth."""
    layers, batch, _ = matches.shape
    classes = labels.new_full((layers, batch, queries + 1), nothing)
    spare = torch.where(matches < 0, queries, matches)  # truths without a query land behind the end
    return classes.scatter_(2, spare, labels.expand_as(matches))[..., :queries]
