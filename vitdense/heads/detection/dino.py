"""DINO (Zhang et al. 2023, "DETR with Improved DeNoising Anchor Boxes")."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from vitdense.heads.detection.decoder import Decoder, SinePlace
from vitdense.heads.detection.deformable_encoder import DeformableEncoder
from vitdense.heads.detection.deformable_transformer import (
    DeformableDecoderLayer,
    DeformableEncoderLayer,
    Predictor,
)
from vitdense.heads.detection.denoising import Denoising
from vitdense.heads.detection.inputs import LevelInputs, choose_levels, first_map, flatten_levels
from vitdense.heads.detection.queries import QueryOutputs
from vitdense.heads.detection.two_stage import TwoStageHead
from vitdense.losses.classification import CLASS_LOSSES
from vitdense.losses.set_criterion import SetCriterion
from vitdense.registry import HEADS, Fraction
from vitdense.structures import Level, Target

EPS = 1e-3
"""Coordinates stay this far from 0 and 1, as in the authors' code, which the weights rely on."""


@HEADS.register("dino")
class DinoHead(TwoStageHead):
    """DINO: deformable encoder and decoder, selected boxes with learned contents, denoising."""

    def __init__(
        self,
        levels: list[Level],
        num_classes: int,
        *,
        input_levels: list[int] | None = None,  # which to read; by default strides from 8
        num_levels: PositiveInt = 4,  # levels of attention; those missing are made from the last
        width: PositiveInt = 256,  # of the queries and of the cells
        heads: PositiveInt = 8,  # of attention
        points: PositiveInt | list[PositiveInt] = 4,  # sampled by each head, on each level
        ffn: PositiveInt = 2048,  # hidden width of the feed-forward layers
        encoder_layers: NonNegativeInt = 6,  # layers of deformable attention over the cells
        checkpointing: bool = False,  # recompute the encoder in backward: less memory, more time
        decoder_layers: PositiveInt = 6,  # layers of queries over the cells
        queries: PositiveInt = 900,  # most objects that an image can have
        dropout: Fraction = 0.0,  # in every transformer layer
        two_stage: bool = True,  # queries are the best cells of the encoder, not learned
        train_all_cells: bool = False,  # the first stage learns from all, not from the best alone
        learned_content: bool = True,  # of the queries; else they start as their cells
        box_refinement: bool = True,  # each layer corrects the boxes of the one before
        look_twice: bool = True,  # a layer's box loss also trains the layer before
        share_predictors: bool = False,  # one classifier and box regressor for all layers
        denoising: NonNegativeInt = 100,  # positives made of noisy truth for each image; 0: none
        label_noise: Fraction = 0.5,  # twice the share of labels drawn anew in denoising
        box_noise: NonNegativeFloat = 1.0,  # how far corners move in denoising, in half boxes
        class_loss: Literal["focal", "varifocal", "matchability"] = "focal",  # what scores learn
        class_cost: NonNegativeFloat = 2.0,  # of the class in matching; L1 costs 5 and GIoU 2
        class_weight: NonNegativeFloat = 1.0,  # of the class loss, beside L1 with 5 and GIoU with 2
        max_detections: PositiveInt = 300,  # best ones kept for each image
        score_threshold: Fraction = 0.0,  # less sure answers are left out; metrics want all
        nms: Fraction | None = None,  # overlap from which the lesser box of a class is dropped
        masks: bool = False,  # answer instance masks too, and learn them beside the boxes
        mask_weight: NonNegativeFloat = 1.0,  # of their cross-entropy and dice losses; COCO's use 5
        mask_points: PositiveInt = 4096,  # of an image, and of each mask, in their costs and losses
    ) -> None:
        if width % 4:
            raise ValueError(f"width: must be a multiple of 4 for the positions, not {width}")
        encoder_points = points if isinstance(points, int) else max(points)
        sizes = (width, heads, ffn, dropout, num_levels)
        count = 1 if share_predictors else decoder_layers
        decoder = Decoder(
            [DeformableDecoderLayer(*sizes, points) for _ in range(decoder_layers)],
            [Predictor(width, num_classes, eps=EPS) for _ in range(count)],
            place=SinePlace(width),
            norm=nn.LayerNorm(width),
            refine=box_refinement,
            look_twice=look_twice,
        )
        noise = (num_classes, width, denoising, label_noise, box_noise)
        facts = levels, num_classes, max_detections, nms, score_threshold
        super().__init__(
            *facts,
            width=width,
            queries=queries,
            decoder=decoder,
            denoising=Denoising(*noise) if denoising else None,
            two_stage=two_stage,
            train_all_cells=train_all_cells,
            learned_content=learned_content,
        )
        self.input_levels = choose_levels(levels, input_levels, num_levels)
        self.inputs = LevelInputs(
            [levels[i].channels for i in self.input_levels], width, num_levels
        )
        # positions as in the official code and weights: no offset, temperature 20
        self.encoder = DeformableEncoder(
            [DeformableEncoderLayer(*sizes, encoder_points) for _ in range(encoder_layers)],
            num_levels,
            width,
            offset=0,
            temperature=20,
            checkpointing=checkpointing,
        )
        self.criterion = SetCriterion(
            CLASS_LOSSES[class_loss](), class_cost=class_cost, class_weight=class_weight
        )
        self.add_masks(masks, self.input_levels[0], width, mask_points, mask_weight)

    def forward(self, features: list[Tensor], targets: list[Target] | None = None) -> QueryOutputs:
        """Outputs with C = num_classes logits."""
        maps = self.inputs([features[i] for i in self.input_levels])
        shapes = [(x.shape[-2], x.shape[-1]) for x in maps]
        memory = self.encoder(flatten_levels(maps), shapes)
        pixels = self.pixels(first_map(memory, shapes), features)
        return self.decode(memory, shapes, self.canvas(features), targets, pixels)
