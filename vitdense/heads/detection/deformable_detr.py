"""Deformable DETR (Zhu et al. 2021), with its two-stage and box-refining variants."""

from __future__ import annotations

from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from vitdense.heads.detection.decoder import Decoder
from vitdense.heads.detection.deformable_encoder import DeformableEncoder
from vitdense.heads.detection.deformable_transformer import (
    DeformableDecoderLayer,
    DeformableEncoderLayer,
    Predictor,
)
from vitdense.heads.detection.inputs import LevelInputs, choose_levels, flatten_levels
from vitdense.heads.detection.proposals import FirstStage, cell_anchors
from vitdense.heads.detection.queries import QueryHead, QueryOutputs
from vitdense.layers.position import box_embedding
from vitdense.losses.classification import FocalLoss
from vitdense.losses.set_criterion import Queries, SetCriterion
from vitdense.registry import HEADS, Fraction
from vitdense.structures import Level, Target


@HEADS.register("deformable_detr")
class DeformableDetrHead(QueryHead):
    """Deformable DETR: attention to a few points on several levels, in encoder and decoder."""

    def __init__(
        self,
        levels: list[Level],
        num_classes: int,
        *,
        input_levels: list[int] | None = None,  # which to read; by default those of stride 8 and up
        num_levels: PositiveInt = 4,  # levels of attention; those missing are made from the last
        width: PositiveInt = 256,  # channels of the queries and of the maps
        heads: PositiveInt = 8,  # attention heads
        points: PositiveInt = 4,  # sampled by each head on each level
        ffn: PositiveInt = 1024,  # hidden width of the feed-forward layers
        encoder_layers: NonNegativeInt = 6,  # layers of deformable attention over the cells
        checkpointing: bool = False,  # recompute the encoder in backward: less memory, more time
        decoder_layers: PositiveInt = 6,  # layers in which queries attend to the maps
        queries: PositiveInt = 300,  # most objects that an image can have
        dropout: Fraction = 0.1,  # in every transformer layer
        two_stage: bool = True,  # queries start from the best cells of the encoder; else learned
        class_aware_proposals: bool = False,  # the first stage tells classes apart
        box_refinement: bool = True,  # each layer corrects the boxes of the one before
        aux_loss: bool = True,  # train every decoder layer, not just the last
        max_detections: PositiveInt = 100,  # best ones kept for each image
        score_threshold: Fraction = 0.0,  # drops lower scores; keep 0 to measure AP
        nms: Fraction | None = None,  # IoU from which a class's lower-scoring box is dropped
    ) -> None:
        super().__init__(levels, num_classes, max_detections, nms, score_threshold)
        if width % 4:
            raise ValueError(f"width: must be a multiple of 4 for the positions, not {width}")
        if box_refinement and not aux_loss:
            raise ValueError("aux_loss: box_refinement trains its earlier layers through it")
        self.input_levels = choose_levels(levels, input_levels, num_levels)
        self.two_stage, self.aux_loss = two_stage, aux_loss
        self.width, self.num_queries = width, queries
        self.class_aware_proposals = class_aware_proposals
        self.inputs = LevelInputs(
            [levels[i].channels for i in self.input_levels], width, num_levels
        )
        sizes = (width, heads, ffn, dropout, num_levels, points)
        self.encoder = DeformableEncoder(
            [DeformableEncoderLayer(*sizes) for _ in range(encoder_layers)],
            num_levels,
            width,
            checkpointing=checkpointing,
        )
        self._build_queries()
        # without refinement all layers predict from the same references, by one predictor
        count = decoder_layers if box_refinement else 1
        # learned references are points: boxes start at an eighth of the image
        starts = [0.0 if two_stage or i else -2.0 for i in range(count)]
        self.decoder = Decoder(
            [DeformableDecoderLayer(*sizes) for _ in range(decoder_layers)],
            [Predictor(width, num_classes, start) for start in starts],
            refine=box_refinement,
        )
        self.criterion = SetCriterion(FocalLoss(), class_cost=2.0, class_weight=2.0)

    def _build_queries(self) -> None:
        width = self.width
        if not self.two_stage:
            self.queries = nn.Embedding(self.num_queries, 2 * width)
            self.references = nn.Linear(width, 2)
            nn.init.xavier_uniform_(self.references.weight)
            nn.init.zeros_(self.references.bias)
            return
        classes = self.num_classes if self.class_aware_proposals else 1
        self.first_stage = FirstStage(width, Predictor(width, classes))
        self.place = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.LayerNorm(2 * width))

    def forward(self, features: list[Tensor], targets: list[Target] | None = None) -> QueryOutputs:
        """Outputs with C = num_classes logits."""
        memory, shapes = flatten_levels(self.inputs([features[i] for i in self.input_levels]))
        memory = self.encoder(memory, shapes)
        others: dict[str, Queries] = {}
        if self.two_stage:
            anchors = cell_anchors(shapes, self.first_stage.predictor.classes.weight)
            proposed = self.first_stage(memory, *anchors)
            others["_encoder"] = Queries(
                proposed.logits[None], proposed.boxes[None], agnostic=not self.class_aware_proposals
            )
            references = proposed.best(self.num_queries).boxes.detach()
            embedded = self.place(box_embedding(references, self.width // 2))
            places, queries = embedded.chunk(2, -1)
        else:
            embedded = self.queries.weight[None].expand(len(memory), -1, -1)
            places, queries = embedded.chunk(2, -1)
            references = self.references(places).sigmoid()
        decoded = self.decoder(queries, references, memory, shapes, places=places)
        first = 0 if self.aux_loss else -1
        return QueryOutputs(
            decoded.logits[first:], decoded.boxes[first:], self.canvas(features), others=others
        )
