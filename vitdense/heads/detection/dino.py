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
from vitdense.heads.detection.inputs import LevelInputs, choose_levels, flatten_levels, split_levels
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
        input_levels: list[int] | None = None,  # which to read; by default those of stride 8 and up
        num_levels: PositiveInt = 4,  # levels of attention; those missing are made from the last
        width: PositiveInt = 256,  # channels of the queries and of the maps
        heads: PositiveInt = 8,  # attention heads
        points: PositiveInt | list[PositiveInt] = 4,  # sampled by each head, on each level
        ffn: PositiveInt = 2048,  # hidden width of the feed-forward layers
        encoder_layers: NonNegativeInt = 6,  # layers of deformable attention over the cells
        checkpointing: bool = False,  # recompute the encoder in backward: less memory, more time
        decoder_layers: PositiveInt = 6,  # layers in which queries attend to the maps
        queries: PositiveInt = 900,  # most objects that an image can have
        dropout: Fraction = 0.0,  # in every transformer layer
        two_stage: bool = True,  # queries start from the best cells of the encoder; else learned
        train_all_cells: bool = False,  # the first stage learns from all cells, not the best alone
        learned_content: bool = True,  # of the queries; else they start with that of their cells
        box_refinement: bool = True,  # each layer corrects the boxes of the one before
        look_twice: bool = True,  # a layer's box loss also trains the layer before
        share_predictors: bool = False,  # one classifier and box regressor for all layers
        denoising: NonNegativeInt = 100,  # noisy positives for each image, about; 0 = none
        label_noise: Fraction = 0.5,  # twice the share of labels drawn anew in denoising
        box_noise: NonNegativeFloat = 1.0,  # of corners in denoising, in half widths and heights
        class_loss: Literal["focal", "varifocal", "matchability"] = "focal",  # of the classes
        class_cost: NonNegativeFloat = 2.0,  # of the class in matching; L1 has 5 and GIoU 2
        class_weight: NonNegativeFloat = 1.0,  # of the class loss; L1 has 5 and GIoU 2
        max_detections: PositiveInt = 300,  # best ones kept for each image
        score_threshold: Fraction = 0.0,  # drops lower scores; keep 0 to measure AP
        nms: Fraction | None = None,  # IoU from which a class's lower-scoring box is dropped
        masks: bool = False,  # predict instance masks too
        mask_weight: NonNegativeFloat = 1.0,  # of their cross-entropy and dice losses; 5 for COCO
        mask_points: PositiveInt = 4096,  # points of a mask that matching and loss look at
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
        memory, shapes = flatten_levels(self.inputs([features[i] for i in self.input_levels]))
        memory = self.encoder(memory, shapes)
        pixels = self.pixels(split_levels(memory, shapes)[0], features)
        return self.decode(memory, shapes, self.canvas(features), targets, pixels)
