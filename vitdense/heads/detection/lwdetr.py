"""LW-DETR (Chen et al. 2024, 2406.03459), whose decoder RF-DETR shares."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from vitdense.heads.detection.decoder import Decoder, SinePlace
from vitdense.heads.detection.deformable_transformer import (
    DeformableDecoderLayer,
    ScaledPredictor,
)
from vitdense.heads.detection.inputs import choose_levels, flatten_levels
from vitdense.heads.detection.proposals import FirstStage, cell_anchors
from vitdense.heads.detection.queries import QueryHead, QueryOutputs
from vitdense.layers.norm import make_norm
from vitdense.losses.classification import CLASS_LOSSES
from vitdense.losses.set_criterion import Queries, SetCriterion
from vitdense.registry import HEADS, Fraction
from vitdense.structures import Level, Target


@HEADS.register("lwdetr")
class LwDetrHead(QueryHead):
    """LW-DETR: no encoder; the best cells of the maps are references of learned queries.

    In training there are several groups of queries, each with its own first stage, and each matched
    by itself (Chen et al. 2023, Group DETR); the first group answers. The neck
    `multi_scale_projector` makes the maps as the authors do; maps of another width than the queries
    are projected.
    """

    def __init__(
        self,
        levels: list[Level],
        num_classes: int,
        *,
        input_levels: list[int] | None = None,  # which to read; by default those of stride 8 and up
        width: PositiveInt = 256,  # channels of the queries and of the maps
        heads: PositiveInt = 8,  # attention heads among the queries
        cross_heads: PositiveInt = 16,  # attention heads over the maps
        points: PositiveInt = 2,  # sampled by each of these heads on each level
        ffn: PositiveInt = 2048,  # hidden width of the feed-forward layers
        decoder_layers: PositiveInt = 3,  # layers in which queries attend to the maps
        queries: PositiveInt = 300,  # most objects that an image can have
        groups: PositiveInt = 13,  # sets of queries in training; more of them learn faster
        dropout: Fraction = 0.0,  # in every transformer layer
        box_refinement: bool = False,  # each layer corrects the boxes of the one before
        class_loss: Literal[
            "iou_aware", "focal", "varifocal", "matchability"
        ] = "iou_aware",  # of the classes
        aux_loss: bool = True,  # train every decoder layer, not just the last
        max_detections: PositiveInt = 100,  # best ones kept for each image
        score_threshold: Fraction = 0.0,  # drops lower scores; keep 0 to measure AP
        nms: Fraction | None = None,  # IoU from which a class's lower-scoring box is dropped
        masks: bool = False,  # predict instance masks too
        mask_weight: NonNegativeFloat = 1.0,  # of their cross-entropy and dice losses; 5 for COCO
        mask_points: PositiveInt = 4096,  # points of a mask that matching and loss look at
    ) -> None:
        super().__init__(levels, num_classes, max_detections, nms, score_threshold)
        if width % 4:
            raise ValueError(f"width: must be a multiple of 4 for the positions, not {width}")
        if box_refinement and not aux_loss:
            raise ValueError("aux_loss: box_refinement trains its earlier layers through it")
        self.input_levels = choose_levels(levels, input_levels, len(levels))
        self.num_queries, self.groups, self.aux_loss = queries, groups, aux_loss
        self.inputs = nn.ModuleList(_input(levels[i].channels, width) for i in self.input_levels)
        self.first_stages = nn.ModuleList(
            FirstStage(width, ScaledPredictor(width, num_classes), 0.0, unusable_last=True)
            for _ in range(groups)
        )
        self.queries = nn.Embedding(groups * queries, width)
        self.offsets = nn.Embedding(groups * queries, 4)
        nn.init.zeros_(self.offsets.weight)
        sizes = (width, heads, ffn, dropout, len(self.input_levels), points)
        self.decoder = Decoder(
            [
                DeformableDecoderLayer(*sizes, cross_heads=cross_heads)
                for _ in range(decoder_layers)
            ],
            [ScaledPredictor(width, num_classes)],
            place=SinePlace(width),
            norm=nn.LayerNorm(width),
            refine=box_refinement,
        )
        self.criterion = SetCriterion(CLASS_LOSSES[class_loss](), class_cost=2.0, class_weight=1.0)
        self.add_masks(masks, self.input_levels[0], width, mask_points, mask_weight)

    def forward(self, features: list[Tensor], targets: list[Target] | None = None) -> QueryOutputs:
        """Outputs with C = num_classes logits, of all groups in training."""
        maps = [
            project(features[i]) for i, project in zip(self.input_levels, self.inputs, strict=True)
        ]
        memory, shapes = flatten_levels(maps)
        groups = self.groups if self.training else 1
        count = min(self.num_queries, memory.shape[1])
        encoder = self._propose(memory, *cell_anchors(shapes, self.offsets.weight), groups, count)
        predictor: ScaledPredictor = self.decoder.predictors[0]  # type: ignore[assignment]
        references = predictor.move(
            encoder.boxes[0].detach(), self._learned(self.offsets, groups, count)
        )
        queries = self._learned(self.queries, groups, count).expand(len(memory), -1, -1)
        decoded = self.decoder(queries, references, memory, shapes, groups=groups, embed=self.embed)
        first = 0 if self.aux_loss else -1
        return QueryOutputs(
            decoded.logits[first:],
            decoded.boxes[first:],
            self.canvas(features),
            groups,
            others={"_encoder": encoder},
            details={name: x[first:] for name, x in decoded.details.items()},
            pixels=self.pixels(maps[0], features),
        )

    def _propose(
        self, memory: Tensor, anchors: Tensor, usable: Tensor, groups: int, count: int
    ) -> Queries:
        """Proposals of the best cells of each group, group after group."""
        stages: list[FirstStage] = list(self.first_stages)[:groups]  # type: ignore[assignment]
        best = [stage.best(memory, anchors, usable, count) for stage in stages]
        logits, boxes = (
            torch.cat(x, 1) for x in ([p.logits for p in best], [p.boxes for p in best])
        )
        return Queries(logits[None], boxes[None], groups=groups)

    def _learned(self, rows: nn.Embedding, groups: int, count: int) -> Tensor:
        """Rows of the first `count` queries of each group, float [1, groups * count, width]."""
        return rows.weight.unflatten(0, (self.groups, -1))[:groups, :count].flatten(0, 1)[None]


def _input(channels: int, width: int) -> nn.Module:
    if channels == width:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels, width, 1), make_norm("layer", width))
