"""Class losses of set predictors, each with the cost by which it matches.

Both halves live together because a head that matches by one and trains by another learns to rank
queries that it is never trained on. All tensors carry the predictions' layers first:
logits [L, B, Q, C], matches [L, B, T] (the query of each truth, -1 for none), labels [B, T].
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class ClassLoss(Protocol):
    """What the set criterion asks of a class loss."""

    def cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cost of giving each truth to each query, float [L, B, T, Q]."""
        ...

    def loss(self, logits: Tensor, labels: Tensor, matches: Tensor, normalizer: Tensor) -> Tensor:
        """Loss of each layer, float [L]; `normalizer` is the number of truths, a scalar."""
        ...


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

    def loss(self, logits: Tensor, labels: Tensor, matches: Tensor, normalizer: Tensor) -> Tensor:
        """Weighted mean of cross-entropies, float [L]."""
        nothing = logits.shape[-1] - 1
        classes = classes_of_queries(matches, labels, logits.shape[2], nothing)
        losses = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction="none")
        weights = torch.ones_like(losses).masked_fill(classes.flatten() == nothing, self.background)
        per_layer = (len(logits), -1)
        return (losses * weights).view(per_layer).sum(1) / weights.view(per_layer).sum(1)


class FocalLoss:
    """Sigmoid focal loss (Lin et al. 2017), summed and divided by the number of truths.

    Almost every entry is a negative: all are summed as such without a target tensor, then the
    few matched ones are exchanged.
    """

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0) -> None:
        self.alpha = alpha
        self.gamma = gamma

    def cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What the loss changes if the query is given the truth's class."""
        chosen = pick_labels(logits, labels)
        return self.positive(chosen) - self.negative(chosen)

    def loss(self, logits: Tensor, labels: Tensor, matches: Tensor, normalizer: Tensor) -> Tensor:
        """Sum over queries and classes over the number of truths, float [L]."""
        entries = matches.clamp(min=0) * logits.shape[-1] + labels
        chosen = logits.flatten(2).gather(2, entries)
        exchange = (self.positive(chosen) - self.negative(chosen)) * (matches >= 0)
        return (self.negative(logits).sum((1, 2, 3)) + exchange.sum((1, 2))) / normalizer

    def positive(self, logits: Tensor) -> Tensor:
        """Loss of entries whose target is 1."""
        return self.alpha * logits.neg().sigmoid() ** self.gamma * F.softplus(-logits)

    def negative(self, logits: Tensor) -> Tensor:
        """Loss of entries whose target is 0."""
        return (1 - self.alpha) * logits.sigmoid() ** self.gamma * F.softplus(logits)


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
