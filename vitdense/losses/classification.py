"""Class losses of set predictors, each with the cost by which it matches.

Both halves live together because a head that matches by one and trains by another learns to rank
queries that it is never trained on. All tensors carry the predictions' layers first:
logits [L, B, Q, C], matches [L, B, T] (the query of each truth, -1 for none), labels [B, T], and
overlaps [L, B, T] (IoU of each truth and its query, without a gradient).
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
            number: truths of an image, for what else is to be counted in all batches of the step.
        """
        ...


@dataclass(frozen=True)
class QueryWeight:
    """The weight of an image's queries: those that have a truth, and those that have none."""

    number: Callable[[Target], int]
    queries: int
    found: float
    others: float

    def __call__(self, target: Target) -> float:
        found = min(self.number(target), self.queries)
        return self.found * found + self.others * (self.queries - found)


class SoftmaxLoss:
    """Cross-entropy over the classes and, last, "no object" (Carion et al. 2020, DETR).

    The mean over the queries is weighted, "no object" by `background`; it is not divided by the
    number of truths.
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
    """What losses on independent classes share: a sum divided by the number of truths.

    Almost every entry is a negative: all are summed as such without a target tensor, then the
    few matched ones are exchanged. Queries are matched by the focal cost (alpha 0.25, gamma 2),
    whichever loss trains them.

    Args:
        alpha: weight, whose meaning the loss defines.
        gamma: exponent by which easy negatives count less.
    """

    def __init__(self, alpha: float, gamma: float = 2.0) -> None:
        self.alpha = alpha
        self.gamma = gamma

    def cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What the focal loss changes if the query is given the truth's class."""
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
        """Sum over queries and classes over the number of truths, float [L]."""
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
    """Sigmoid focal loss (Lin et al. 2017): blind to how well the box fits."""

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0) -> None:
        super().__init__(alpha, gamma)

    def cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What the loss changes if the query is given the truth's class."""
        chosen = pick_labels(logits, labels)
        return self.positive(chosen, chosen) - self.negative(chosen)

    def positive(self, logits: Tensor, overlaps: Tensor) -> Tensor:
        return _focal(logits, self.alpha, self.gamma)

    def negative(self, logits: Tensor) -> Tensor:
        return _focal(-logits, 1 - self.alpha, self.gamma)


class VarifocalLoss(SigmoidLoss):
    """The score of a match is to be its IoU, which also weighs it (Zhang et al. 2021)."""

    def __init__(self, alpha: float = 0.75, gamma: float = 2.0) -> None:
        super().__init__(alpha, gamma)

    def positive(self, logits: Tensor, overlaps: Tensor) -> Tensor:
        return overlaps * _cross_entropy(logits, overlaps)

    def negative(self, logits: Tensor) -> Tensor:
        # the weight has no gradient, as in the paper's code
        return self.alpha * logits.detach().sigmoid() ** self.gamma * F.softplus(logits)


class MatchabilityLoss(SigmoidLoss):
    """Varifocal without its weight on matches of little overlap (Huang et al. 2025, DEIM).

    A match's target is IoU ** gamma, and it counts fully however badly its box fits yet.
    """

    def __init__(self, alpha: float = 1.0, gamma: float = 1.5) -> None:
        super().__init__(alpha, gamma)

    def positive(self, logits: Tensor, overlaps: Tensor) -> Tensor:
        return _cross_entropy(logits, overlaps**self.gamma)

    def negative(self, logits: Tensor) -> Tensor:
        return self.alpha * logits.detach().sigmoid() ** self.gamma * F.softplus(logits)


class IoUAwareLoss(SigmoidLoss):
    """The score of a match is to be p ** alpha * IoU ** (1 - alpha) (Chen et al. 2024, LW-DETR)."""

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
"""The losses that heads with sigmoid scores offer, by the name of their option."""


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
