"""EoMT: a plain vision transformer that segments by itself.

"Your ViT is secretly an image segmentation model", Kerssies et al., CVPR 2025, arXiv 2503.19108:
queries join the tokens before the last blocks, and all classes and masks are read from them. In
training each query sees only the patches of its mask so far; block after block this is given up
(section 3.3), so that in evaluation a bare transformer runs.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitdense.backbones.base import Backbone
from vitdense.heads.segmentation.eomt_head import EomtHead, attention_bias
from vitdense.heads.segmentation.mask_head import MaskOutputs
from vitdense.losses.mask_criterion import MaskCriterion
from vitdense.models.headed import HeadedModel
from vitdense.registry import MODELS, Builder, Fraction
from vitdense.structures import Size, Target


@MODELS.register("eomt")
class EomtModel(HeadedModel):
    """Queries in the last blocks of a plain ViT of timm; registers and rotary positions are fine.

    With `image_head` a second head labels the whole image, from the patches or the class token
    after the last block.

    Raises:
        ValueError: the backbone is no plain ViT that takes images of any size, or it has options
            for maps (`windows`, `level_norm`, `class_token`), of which there are none here.
    """

    head: EomtHead

    def __init__(
        self,
        num_classes: int,
        image_classes: int = 0,
        *,
        backbone: Builder[Backbone],  # a plain ViT of timm; all blocks to the last of out_indices
        task: Literal["semantic", "instance", "panoptic"] = "panoptic",  # what to answer
        queries: PositiveInt = 200,  # masks that are found in an image at most
        blocks: PositiveInt = 4,  # last blocks that the queries run through
        upscale: NonNegativeInt | None = None,  # doublings of the map; null = until stride 4
        masking: Literal["annealed", "always", "never"] = "annealed",  # queries see just their mask
        annealing: list[tuple[Fraction, Fraction]] | None = None,  # when masking fades, per block
        annealing_power: PositiveFloat = 0.9,  # of the polynomial by which masking fades
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
        image_head: Literal["mean", "attention", "token"]
        | None = None,  # labels whole images too: by the pooled patches, or by the class token
        image_weight: PositiveFloat = 1.0,  # of the loss of image_head
    ) -> None:
        super().__init__()
        self.num_classes, self.task = num_classes, task
        self.backbone = backbone()
        self.divisor = open_vit(self.backbone, blocks, queries)
        self.first = len(self.vit.blocks) - blocks
        self.head = EomtHead(
            self.backbone.levels[-1:],
            num_classes,
            task,
            queries,
            upscale,
            criterion=MaskCriterion(
                class_weight=class_weight,
                mask_weight=mask_weight,
                dice_weight=dice_weight,
                background=background,
                points=mask_points,
            ),
            max_detections=max_detections,
            nms=nms,
            score_threshold=score_threshold,
            overlap_threshold=overlap_threshold,
        )
        # some families have their norm after the pooling, which is cut off
        width = self.backbone.levels[-1].channels
        self.norm = nn.Identity() if self.backbone.normed else nn.LayerNorm(width, eps=1e-6)
        if annealing is not None and masking != "annealed":
            raise ValueError(f"annealing: is of `masking: annealed`, not of {masking}; remove it")
        self.masking = masking
        self.annealing = check_annealing(annealing, blocks)
        self.annealing_power = annealing_power
        self.add_image_head(image_head, image_classes, image_weight)

    @property
    def vit(self) -> Any:
        """timm's model within the backbone."""
        return self.backbone.model

    def forward(self, images: Tensor, targets: list[Target] | None = None) -> Any:
        """Answers for uint8 images [B, C, H, W]: after the last block, and before it where needed.

        Returns:
            `MaskOutputs`; within `ImageOutputs` if there is an image head. In training, and while
            masking needs them, also the answers before each of the last blocks.
        """
        from vitdense.backbones.windows import embed

        grid = images.shape[-2] // self.divisor, images.shape[-1] // self.divisor
        tokens, rope = embed(self.vit, self.normalize(images))
        probabilities = self.masking_probabilities()
        answers = []
        for index, block in enumerate(self.vit.blocks):
            bias = None
            if index == self.first:
                queries = self.head.queries.weight.expand(len(tokens), -1, -1)
                tokens = torch.cat((queries, tokens), 1)
            if index >= self.first:
                probability = probabilities[index - self.first]
                if self.training or probability > 0:
                    answers.append(self.head(self._read(tokens, grid)[:2]))
                if probability > 0:
                    bias = attention_bias(answers[-1].masks[0], grid, tokens, probability)
            tokens = self._run(block, tokens, rope_of(self.vit, rope, index), bias)
        queries, patches, token = self._read(tokens, grid)
        answers.append(self.head([queries, patches]))
        logits = torch.cat([answer.logits for answer in answers])
        masks = [answer.masks[0] for answer in answers]
        outputs = MaskOutputs(logits, masks, answers[-1].canvas)
        return self.with_image(outputs, token if self.wants_token else patches)

    # compiled code would be bound to one value of `progress`
    @torch.compiler.disable
    def masking_probabilities(self) -> list[float]:
        """Probability that a query is held to its mask, for each of the last blocks.

        It falls from 1 to 0 over the block's part of the run, as `(1 - t) ** annealing_power`.
        """
        if self.masking == "always":
            return [1.0] * len(self.annealing)
        if self.masking == "never" or not self.training:
            return [0.0] * len(self.annealing)
        return [fade(self.progress, span) ** self.annealing_power for span in self.annealing]

    def _read(self, tokens: Tensor, grid: Size) -> list[Tensor]:
        """Queries [B, Q, C], patches [B, C, h, w] and class token [B, C], normed."""
        normed, queries = self.norm(self.vit.norm(tokens)), self.head.queries.num_embeddings
        patches = normed[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)
        return [normed[:, :queries], patches, normed[:, queries]]

    def _run(
        self, block: Any, tokens: Tensor, rope: dict[str, Tensor], bias: Tensor | None
    ) -> Tensor:
        """One block, under activation checkpointing if the backbone has it on."""
        run = partial(block, attn_mask=bias, **rope)
        if self.vit.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(run, tokens, use_reentrant=False)
        return run(tokens)


def open_vit(backbone: Backbone, blocks: int, queries: int) -> int:
    """Prepare the last blocks of a ViT for `queries` additional tokens before all others.

    Returns:
        side of a patch in pixels.

    Raises:
        ValueError: the backbone is no plain ViT, or none that can be opened.
    """
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    from vitdense.backbones.timm import TimmBackbone

    name = getattr(backbone, "name", type(backbone).__name__)
    if (
        not isinstance(backbone, TimmBackbone)
        or not isinstance(backbone.model, VisionTransformer | Eva)
        or backbone.canvas.fixed
    ):
        raise ValueError(
            f"backbone: {name} cannot be opened for queries; plain ViTs of timm that take images "
            "of any size can: vit_*, flexivit_*, deit*, eva*, with registers or rotary too. For "
            "others there is `model: pyramid` with `head: mask2former`"
        )
    if backbone.windows or backbone.level_norms or backbone.class_token != "drop":
        raise ValueError(
            "backbone: eomt reads tokens, not maps; leave out windows, level_norm and class_token"
        )
    if blocks > len(backbone.model.blocks):
        raise ValueError(f"blocks: {name} has {len(backbone.model.blocks)}, not {blocks}")
    for block in backbone.model.blocks[-blocks:]:
        attention: Any = block.attn
        if hasattr(attention, "num_prefix_tokens"):  # these are not rotated
            attention.num_prefix_tokens += queries
    return int(backbone.levels[-1].stride)


def rope_of(vit: Any, rope: Tensor | None, index: int) -> dict[str, Tensor]:
    """Keyword arguments of a block for its rotary positions, if there are any."""
    if rope is None:
        return {}
    return {"rope": rope[index] if getattr(vit, "rope_mixed", False) else rope}


def check_annealing(
    spans: list[tuple[float, float]] | None, blocks: int
) -> list[tuple[float, float]]:
    """For each block the part of the run over which its masking fades.

    By default the run is cut into `blocks + 2` equal parts: all is masked in the first, nothing in
    the last, and in between one block after the other fades.

    Raises:
        ValueError: there is not one span for each block, or one ends before it starts.
    """
    if spans is None:
        return [((i + 1) / (blocks + 2), (i + 2) / (blocks + 2)) for i in range(blocks)]
    if len(spans) != blocks or any(start > end for start, end in spans):
        raise ValueError(f"annealing: {spans} must be {blocks} pairs of start and end, one a block")
    return spans


def fade(progress: float, span: tuple[float, float]) -> float:
    """1 before the span, 0 behind it, a straight line within."""
    start, end = span
    if progress < start:
        return 1.0
    return (end - progress) / (end - start) if progress < end else 0.0
