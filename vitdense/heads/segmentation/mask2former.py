"""Mask2Former (Cheng et al. 2022, arXiv 2112.01527)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from vitdense.heads.detection.inputs import choose_levels
from vitdense.heads.segmentation.mask_head import MaskHead, MaskOutputs
from vitdense.heads.segmentation.masked_decoder import MaskedDecoder, draw_masks
from vitdense.heads.segmentation.pixel_decoder import PixelDecoder
from vitdense.losses.mask_criterion import MaskCriterion
from vitdense.registry import HEADS, Fraction
from vitdense.structures import Level, Target

FINEST = 3
"""Levels of a smaller stride are not read: stride 4, or 3.5 after a patch of 14, is."""


@HEADS.register("mask2former")
class Mask2FormerHead(MaskHead):
    """Queries that attend to the cells within their masks, on one level after the other.

    Raises:
        ValueError: the width suits neither heads nor positions, the levels do not exist, or some
            would not be read.
    """

    def __init__(
        self,
        levels: list[Level],
        num_classes: int,
        *,
        task: Literal["semantic", "instance", "panoptic"] = "panoptic",  # what to answer
        input_levels: list[int] | None = None,  # of attention; by default those of stride 8 and up
        num_levels: PositiveInt = 3,  # levels of attention; those missing are made from the last
        queries: PositiveInt = 100,  # masks that are found in an image at most
        width: PositiveInt = 256,  # channels of the queries and of the maps
        heads: PositiveInt = 8,  # attention heads
        points: PositiveInt = 4,  # sampled by each head on each level
        encoder_layers: NonNegativeInt = 6,  # layers of deformable attention over the cells
        encoder_ffn: PositiveInt = 1024,  # hidden width of their feed-forward layers
        checkpointing: bool = False,  # recompute the encoder in backward: less memory, more time
        decoder_layers: PositiveInt = 9,  # layers in which queries attend to the maps
        ffn: PositiveInt = 2048,  # hidden width of their feed-forward layers
        dropout: Fraction = 0.0,  # in every transformer layer
        class_weight: NonNegativeFloat = 2.0,  # of the class in matching and loss
        mask_weight: NonNegativeFloat = 5.0,  # of the masks' cross-entropy in matching and loss
        dice_weight: NonNegativeFloat = 5.0,  # of the masks' Dice in matching and loss
        background: NonNegativeFloat = 0.1,  # weight of "no object" among the classes
        mask_points: PositiveInt = 12544,  # points of a mask that matching and loss look at
        max_detections: PositiveInt = 100,  # instance: best ones kept for each image
        nms: Fraction
        | None = None,  # instance: overlap from which a class's lesser mask is dropped
        score_threshold: Fraction = 0.8,  # panoptic: queries less sure of their class are left out
        overlap_threshold: Fraction = 0.8,  # panoptic: and those that win less of their mask
    ) -> None:
        criterion = MaskCriterion(
            class_weight=class_weight, mask_weight=mask_weight, dice_weight=dice_weight,
            background=background, points=mask_points,
        )  # fmt: skip
        super().__init__(
            levels, num_classes, task, criterion, max_detections, nms, score_threshold,
            overlap_threshold,
        )  # fmt: skip
        if width % 4:
            raise ValueError(f"width: must be a multiple of 4 for the positions, not {width}")
        if not encoder_layers and decoder_layers < num_levels - 1:
            raise ValueError(
                f"decoder_layers: {decoder_layers} read so many levels of {num_levels}; without "
                f"encoder_layers at least {num_levels - 1} are needed"
            )
        self.coarse = choose_levels(levels, input_levels, num_levels)
        self.fine = [i for i in range(self.coarse[0]) if levels[i].stride >= FINEST]
        self.pixel_decoder = PixelDecoder(
            [levels[i].channels for i in self.fine],
            [levels[i].channels for i in self.coarse],
            num_levels, width, heads, encoder_ffn, encoder_layers, dropout, points,
            checkpointing,
        )  # fmt: skip
        self.decoder = MaskedDecoder(
            num_classes + 1, queries, num_levels, width, heads, ffn, decoder_layers, dropout
        )

    def forward(self, features: list[Tensor], targets: list[Target] | None = None) -> MaskOutputs:
        """In training the predictions before the first layer and after each, else the last."""
        maps, mask_features = self.pixel_decoder(
            [features[i] for i in self.fine], [features[i] for i in self.coarse]
        )
        logits, embeddings = self.decoder(maps, mask_features)
        first = 0 if self.training else -1
        masks = [draw_masks(each, mask_features) for each in embeddings[first:]]
        return MaskOutputs(torch.stack(logits[first:]), masks, self.canvas(features))
