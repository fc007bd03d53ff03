"""Contrastive denoising: queries made of noisy truth (Zhang et al. 2023, DINO, section 3.3)."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitdense.heads.detection.deformable_transformer import EPS
from vitdense.losses.matcher import Truths
from vitdense.losses.set_criterion import Queries
from vitdense.ops.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh


class NoisyQueries(NamedTuple):
    """Queries that go before the ordinary ones.

    Attributes:
        queries: float [B, D, width].
        references: float [B, D, 4], cxcywh in 0..1.
        groups: how many groups the D queries consist of; in each first one positive for each
            truth, then as many negatives.
        matches: int64 [B, T], the query of each truth within its group, -1 for padding.
    """

    queries: Tensor
    references: Tensor
    groups: int
    matches: Tensor

    def mask(self, ordinary: int) -> Tensor:
        """bool [D + ordinary, D + ordinary]: which queries (columns) each may see.

        A group sees itself and the ordinary queries. These see only each other, as all others are
        made of the truth.
        """
        count, device = self.queries.shape[1], self.queries.device
        group = torch.arange(count, device=device) // (count // self.groups)
        group = torch.cat((group, group.new_full((ordinary,), -1)))
        return (group[:, None] == group) | (group == -1)

    @torch.compiler.disable  # otherwise it is compiled again for each number of groups
    def split(self, decoded: Queries) -> tuple[Queries, Queries]:
        """Predictions [L, B, D + Q, ...] -> those of the D noisy queries, and of the Q others."""
        count = self.queries.shape[1]
        noisy, rest = (
            Queries(
                decoded.logits[:, :, part],
                decoded.boxes[:, :, part],
                details={name: x[:, :, part] for name, x in decoded.details.items()},
            )
            for part in (slice(count), slice(count, None))
        )
        return replace(noisy, groups=self.groups, matches=self.matches), rest


class Denoising(nn.Module):
    """Makes noisy queries: positives, whose truth is to be restored, and negatives, noisier ones.

    Args:
        queries: how many positives an image has in all groups, about; with more objects than that
            there is one group.
        label_noise: twice the share of labels that are drawn anew.
        box_noise: how far corners of positives move at most, in half widths and heights; those of
            negatives move up to twice as far.
    """

    def __init__(
        self, num_classes: int, width: int, queries: int, label_noise: float, box_noise: float
    ) -> None:
        super().__init__()
        self.num_classes, self.queries = num_classes, queries
        self.label_noise, self.box_noise = label_noise, box_noise
        # the last row stands for padding
        self.classes = nn.Embedding(num_classes + 1, width, padding_idx=num_classes)

    def forward(self, truths: Truths) -> NoisyQueries:
        """Noisy queries for a batch; without any truth, one group of padding."""
        most = max(truths.counts, default=0)
        size = max(most, 1)
        groups = max(1, self.queries // size) if most else 1
        real = _real(truths, size)
        labels = real.new_full(real.shape, self.num_classes, dtype=torch.long)
        boxes = self.classes.weight.new_zeros(*real.shape, 4)
        if most:
            labels = torch.where(real, truths.labels, labels)
            boxes = truths.boxes.to(boxes.dtype) * real[..., None]
        labels, real = (x.repeat(1, 2 * groups) for x in (labels, real))
        boxes = boxes.repeat(1, 2 * groups, 1)
        queries = self.classes(self._relabel(labels, real))
        negative = torch.arange(2 * size, device=boxes.device).repeat(groups)[:, None] >= size
        references = self._move(boxes, negative)
        matches = torch.where(_real(truths, most), torch.arange(most, device=boxes.device), -1)
        return NoisyQueries(queries, references, groups, matches)

    def _relabel(self, labels: Tensor, real: Tensor) -> Tensor:
        chosen = torch.rand_like(labels, dtype=torch.float) < self.label_noise / 2
        drawn = torch.randint_like(labels, self.num_classes)
        return torch.where(chosen & real, drawn, labels)

    def _move(self, boxes: Tensor, negative: Tensor) -> Tensor:
        """Every corner moves by a random part of half the box, of negatives by more than that."""
        signs = torch.randint_like(boxes, 2) * 2 - 1
        distances = (torch.rand_like(boxes) + negative) * self.box_noise
        half = (boxes[..., 2:] / 2).repeat(1, 1, 2)
        moved = (cxcywh_to_xyxy(boxes) + signs * distances * half).clamp(0, 1)
        # corners may have changed places: such boxes become as good as empty
        return xyxy_to_cxcywh(moved).clamp(EPS, 1 - EPS)


def _real(truths: Truths, size: int) -> Tensor:
    """bool [B, size]: which places hold a truth."""
    device = truths.labels.device
    counts = torch.tensor(truths.counts).to(device, non_blocking=True)
    return torch.arange(size, device=device) < counts[:, None]
