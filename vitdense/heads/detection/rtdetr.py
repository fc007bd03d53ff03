"""RT-DETR (Zhao et al. 2024) and RT-DETRv2, for any pyramid."""

from __future__ import annotations

from functools import partial
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from vitdense.heads.detection.decoder import Decoder
from vitdense.heads.detection.deformable_transformer import DeformableDecoderLayer, Predictor
from vitdense.heads.detection.denoising import Denoising
from vitdense.heads.detection.distribution import DistributionDecoder, GatedDecoderLayer
from vitdense.heads.detection.hybrid_encoder import HybridEncoder, check_steps
from vitdense.heads.detection.inputs import LevelInputs, choose_levels, flatten_levels
from vitdense.heads.detection.queries import QueryOutputs
from vitdense.heads.detection.two_stage import TwoStageHead
from vitdense.layers.conv import ConvNorm
from vitdense.layers.mlp import MLP
from vitdense.layers.norm import Norm
from vitdense.losses.classification import CLASS_LOSSES
from vitdense.losses.distribution import DistributionCriterion
from vitdense.losses.set_criterion import SetCriterion
from vitdense.registry import HEADS, Fraction
from vitdense.structures import Level, Target


@HEADS.register("rtdetr")
class RTDetrHead(TwoStageHead):
    """RT-DETR: attention on the coarsest level, convolutions across levels, the best cells."""

    def __init__(
        self,
        levels: list[Level],
        num_classes: int,
        *,
        input_levels: list[int] | None = None,  # which to read; by default those of stride 8 and up
        num_levels: PositiveInt = 3,  # of the encoder; those missing are made from the last
        width: PositiveInt = 256,  # channels of the queries and of the maps they read
        heads: PositiveInt = 8,  # attention heads
        encoder_width: PositiveInt | None = None,  # of the encoder's maps; by default `width`
        encoder_layers: NonNegativeInt = 1,  # of attention within each attended level
        encoder_ffn: PositiveInt = 1024,  # hidden width of their feed-forward parts
        attended_levels: list[int] | None = None,  # of the num_levels; by default the coarsest
        fusion: Literal["csp", "elan"] = "csp",  # what merges levels: RT-DETR's block or D-FINE's
        blocks: PositiveInt = 3,  # RepVGG blocks in each merging block
        expansion: PositiveFloat = 1.0,  # hidden width of a merging block over encoder_width
        norm: Literal["auto", "batch", "sync", "group", "layer"] = "auto",  # of convolutions
        project_memory: bool = True,  # 1x1 convolution between encoder and decoder
        queries: PositiveInt = 300,  # most objects that an image can have
        two_stage: bool = True,  # queries start from the best cells of the encoder; else learned
        train_all_cells: bool = False,  # the first stage learns from all cells, not the best alone
        learned_content: bool = False,  # of the queries; else they start with that of their cells
        decoder_layers: PositiveInt = 6,  # layers in which queries attend to the maps
        ffn: PositiveInt = 1024,  # hidden width of the decoder's feed-forward parts
        points: PositiveInt | list[PositiveInt] = 4,  # sampled by each head, on each level
        offset_scale: PositiveFloat = 0.5,  # how far points reach, in sizes of the query's box
        box_refinement: bool = True,  # each layer corrects the boxes of the one before
        dropout: Fraction = 0.0,  # in every transformer layer
        denoising: NonNegativeInt = 100,  # noisy positives for each image, about; 0 = none
        label_noise: Fraction = 0.5,  # twice the share of labels drawn anew in denoising
        box_noise: NonNegativeFloat = 1.0,  # of corners in denoising, in half widths and heights
        distribution: bool = False,  # boxes are distributions over bins that layers refine (D-FINE)
        bins: PositiveInt = 32,  # of these distributions: an even number
        bin_scale: PositiveFloat = 4.0,  # how much finer bins are around 0 than far from it
        class_loss: Literal["focal", "varifocal", "matchability"] = "matchability",  # of classes
        max_detections: PositiveInt = 100,  # best ones kept for each image
        score_threshold: Fraction = 0.0,  # drops lower scores; keep 0 to measure AP
        nms: Fraction | None = None,  # IoU from which a class's lower-scoring box is dropped
        masks: bool = False,  # predict instance masks too
        mask_weight: NonNegativeFloat = 1.0,  # of their cross-entropy and dice losses; 5 for COCO
        mask_points: PositiveInt = 4096,  # points of a mask that matching and loss look at
    ) -> None:
        sizes = (width, heads, ffn, dropout, num_levels, points)
        layer = partial(GatedDecoderLayer if distribution else DeformableDecoderLayer, *sizes)
        layers = [layer(reach=offset_scale) for _ in range(decoder_layers)]
        edges = (bins, bin_scale) if distribution else None
        noise = (num_classes, width, denoising, label_noise, box_noise)
        facts = levels, num_classes, max_detections, nms, score_threshold
        super().__init__(
            *facts,
            width=width,
            queries=queries,
            decoder=make_decoder(layers, width, num_classes, box_refinement, edges),
            denoising=Denoising(*noise) if denoising else None,
            two_stage=two_stage,
            train_all_cells=train_all_cells,
            learned_content=learned_content,
        )
        inner = check_width(encoder_width or width, width, project_memory)
        self.input_levels = choose_levels(levels, input_levels, num_levels)
        read = [levels[i] for i in self.input_levels]
        project = partial(project_map, norm)
        self.inputs = LevelInputs([level.channels for level in read], inner, num_levels, project)
        self.encoder = HybridEncoder(
            inner,
            check_steps([level.stride for level in read]) + [2] * (num_levels - len(read)),
            heads=heads,
            ffn=encoder_ffn,
            layers=encoder_layers,
            dropout=dropout,
            attended=check_attended(attended_levels, num_levels),
            blocks=blocks,
            expansion=expansion,
            fusion=fusion,
            norm=norm,
        )
        last = partial(project, inner, width, 1, 1) if project_memory else nn.Identity
        self.memory = nn.ModuleList(last() for _ in range(num_levels))
        self.criterion = make_criterion(class_loss, self.decoder)
        self.add_masks(masks, self.input_levels[0], width, mask_points, mask_weight)

    def forward(self, features: list[Tensor], targets: list[Target] | None = None) -> QueryOutputs:
        """Outputs with C = num_classes logits."""
        maps = self.encoder(self.inputs([features[i] for i in self.input_levels]))
        maps = [project(x) for project, x in zip(self.memory, maps, strict=True)]
        pixels = self.pixels(maps[0], features)
        return self.decode(*flatten_levels(maps), self.canvas(features), targets, pixels)


def make_decoder(
    layers: list[DeformableDecoderLayer],
    width: int,
    num_classes: int,
    refine: bool,
    edges: tuple[int, float] | None,
) -> nn.Module:
    """RT-DETR's decoder, or D-FINE's where `edges` (bins and their scale) are given."""
    if edges is not None:
        if not refine:
            raise ValueError("distribution: is what layers refine; box_refinement must be on")
        return DistributionDecoder(layers, width, num_classes, bins=edges[0], scale=edges[1])
    predictors = [Predictor(width, num_classes) for _ in layers]
    place = MLP(4, 2 * width, width)
    return Decoder(layers, predictors, place=place, refine=refine, look_twice=refine)


def make_criterion(class_loss: str, decoder: nn.Module) -> SetCriterion:
    """The criterion that fits the decoder."""
    loss = CLASS_LOSSES[class_loss]()
    if isinstance(decoder, DistributionDecoder):
        bins, scale = decoder.distances, decoder.scale
        return DistributionCriterion(
            loss, distances=bins, scale=scale, class_cost=2.0, class_weight=1.0
        )
    return SetCriterion(loss, class_cost=2.0, class_weight=1.0)


def project_map(norm: Norm, incoming: int, width: int, kernel: int, stride: int) -> nn.Module:
    """A convolution and its norm."""
    return ConvNorm(incoming, width, kernel, norm, stride, active=False)


def check_width(inner: int, width: int, projected: bool) -> int:
    """The encoder's width; raises ValueError if positions or the decoder cannot have it."""
    if inner % 4:
        raise ValueError(f"encoder_width: must be a multiple of 4 for positions, not {inner}")
    if inner != width and not projected:
        raise ValueError(f"project_memory: is needed from {inner} channels to width {width}")
    return inner


def check_attended(wanted: list[int] | None, count: int) -> list[int]:
    """Indices of the levels with attention; raises ValueError if one does not exist."""
    if wanted is None:
        return [count - 1]
    if not set(wanted) <= set(range(count)):
        raise ValueError(f"attended_levels: must be among the {count} num_levels, not {wanted}")
    return sorted(set(wanted))
