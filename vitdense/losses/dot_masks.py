"""Costs and losses of masks that are dot products of query embeddings and pixel features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vitdense.losses.matcher import full_precision
from vitdense.losses.points import (
    pairwise_bce,
    pairwise_dice,
    point_bce,
    point_dice,
    random_points,
    sample_maps,
    sample_masks,
    uncertain_points,
)
from vitdense.structures import Target

CHUNK = 2**24
"""How many logits are held at once, at points or in maps: 64 MiB."""


class DotMasks:
    """Compares the true masks of a batch with masks that queries and features of pixels predict.

    Nothing here is as large as queries times pixels. For costs the features are sampled at points
    that all queries of an image share, and only then multiplied with embeddings. Losses are of the
    maps of matched queries alone, at points where each is uncertain (Mask2Former, section 3.3);
    where many are matched, some are mapped at a time, and mapped again in the backward pass.

    Args:
        pixels: float [B, M, h, w], features over the canvas.
        targets: with masks, bool [N, H, W] over the same canvas.
        points: how many, in each image for costs, in each matched mask for losses; at most h * w.
        weight: of cross-entropy and of dice, in the loss and in matching. On COCO Mask DINO and
            RF-DETR weigh them by 5; from scratch on a small set 1 gave masks as good as 5 after as
            many steps, and better boxes (AP 0.49 in place of 0.22 after 426 steps on shapes).

    Raises:
        ValueError: a target has no masks.
    """

    def __init__(
        self,
        pixels: Tensor,
        targets: list[Target],
        points: int,
        weight: float,
    ) -> None:
        self.weights = {"mask": weight, "dice": weight}
        self.pixels = full_precision(pixels)
        self.masks = [target.masks for target in targets if target.masks is not None]
        if len(self.masks) < len(targets):
            raise ValueError(
                "targets: a head with `masks: true` learns from masks, and these have none; set "
                "`masks: true` of the data set coco, or `task: instance` of shapes"
            )
        self.points = min(points, pixels.shape[-2] * pixels.shape[-1])
        places = random_points(len(pixels), self.points, self.pixels)
        self.sampled = sample_maps(self.pixels.detach(), places)
        self.truth = [
            self._truth(i, 1, place[None].expand(len(masks), -1, -1))
            for i, (masks, place) in enumerate(zip(self.masks, places, strict=True))
        ]

    @torch.no_grad()
    def cost(self, embeddings: Tensor) -> Tensor:
        """Cost of giving each truth to each query of its own image.

        Args:
            embeddings: float [L, B, Q, M].

        Returns:
            float [L, B, T, Q], 0 for padding.
        """
        embeddings = full_precision(embeddings)
        layers = max(1, CHUNK // max(1, embeddings.shape[2] * self.points))
        most = max(len(masks) for masks in self.masks)
        images = []
        for i, truth in enumerate(self.truth):
            costs = []
            for part in embeddings[:, i].split(layers):
                logits = part @ self.sampled[i]
                bce, dice = pairwise_bce(logits, truth), pairwise_dice(logits, truth)
                costs.append(self.weights["mask"] * bce + self.weights["dice"] * dice)
            images.append(F.pad(torch.cat(costs), (0, 0, 0, most - len(truth))))
        return torch.stack(images, 1)

    def terms(self, embeddings: Tensor, matches: Tensor) -> dict[str, Tensor]:
        """Unweighted sums over the matched queries of each layer, `mask` (BCE) and `dice`, [L].

        Args:
            embeddings: float [L, B, Q, M].
            matches: int64 [L, B, T], the query of each truth, -1 for none.
        """
        embeddings = full_precision(embeddings)
        # sums over nothing, so that every parameter has a gradient where there is no truth
        zero = embeddings[:, :, :0].sum((1, 2, 3)) + self.pixels[..., :0].sum()
        terms = {"mask": zero, "dice": zero}
        for i, masks in enumerate(self.masks):
            if not len(masks):
                continue
            matched = matches[:, i, : len(masks)]
            index = matched.clamp(min=0)[..., None].expand(-1, -1, embeddings.shape[-1])
            chosen = embeddings[:, i].gather(1, index)
            for name, each in zip(terms, self._losses(i, chosen), strict=True):
                terms[name] = terms[name] + (each * (matched >= 0)).sum(1)
        return terms

    def _losses(self, image: int, chosen: Tensor) -> Tensor:
        """Cross-entropy and dice of the masks of embeddings [L, N, M], float [2, L, N]."""
        layers = max(1, CHUNK // (chosen.shape[1] * self.pixels[image, 0].numel()))
        if len(chosen) <= layers:
            return self._map_losses(image, chosen)
        # so that maps need not be kept for the backward pass
        parts = [
            checkpoint(self._map_losses, image, part, use_reentrant=False)
            for part in chosen.split(layers)
        ]
        return torch.cat(parts, 1)

    def _map_losses(self, image: int, chosen: Tensor) -> Tensor:
        maps = torch.einsum("nm,mhw->nhw", chosen.flatten(0, 1), self.pixels[image])
        points = uncertain_points(maps.detach(), self.points)
        logits = sample_maps(maps[:, None], points)[:, 0]
        truth = self._truth(image, len(chosen), points)
        losses = point_bce(logits, truth), point_dice(logits, truth)
        return torch.stack(losses).view(2, *chosen.shape[:2])

    def _truth(self, image: int, layers: int, points: Tensor) -> Tensor:
        """The masks of an image, repeated for each layer, at points [layers * N, P, 2]."""
        masks = self.masks[image]
        rows = torch.arange(len(masks), device=masks.device).repeat(layers)
        return sample_masks(masks, rows, points).to(self.pixels.dtype)
