"""Computing the encoder again in backward: the same gradients, from fewer kept tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from vitdense.heads.detection.deformable_detr import DeformableDetrHead
from vitdense.heads.detection.dino import DinoHead
from vitdense.heads.segmentation.mask2former import Mask2FormerHead
from vitdense.structures import Level

LEVELS = [Level(8, 8), Level(8, 16)]
SMALL = {"width": 16, "heads": 2, "queries": 4, "ffn": 16, "num_levels": 2, "points": 2,
         "encoder_layers": 3, "decoder_layers": 1, "dropout": 0.2}  # fmt: skip
HEADS = [
    (DinoHead, {"denoising": 0}),
    (DeformableDetrHead, {}),
    (Mask2FormerHead, {"encoder_ffn": 16, "task": "instance"}),
]


def encoder_of(head: nn.Module) -> nn.Module:
    return getattr(head, "pixel_decoder", head).encoder  # type: ignore[union-attr, return-value]


def step(head: nn.Module) -> tuple[dict[str, Tensor], int]:
    """Gradients, and numbers kept for backward."""
    torch.manual_seed(1)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    features = [torch.randn(2, 8, side, side) for side in (8, 4)]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = head(features)
    outputs.logits.square().sum().backward()
    return {n: p.grad for n, p in head.named_parameters() if p.grad is not None}, sum(kept.values())


@pytest.mark.parametrize(("kind", "options"), HEADS, ids=lambda it: getattr(it, "__name__", ""))
def test_gradients_are_the_same_with_dropout_too(kind, options):
    torch.manual_seed(0)
    plain = kind(LEVELS, 3, **SMALL, **options).train()
    again = kind(LEVELS, 3, checkpointing=True, **SMALL, **options).train()
    again.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert encoder_of(again).checkpointing and not encoder_of(plain).checkpointing
    (expected, much), (found, little) = step(plain), step(again)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    assert little < 0.7 * much
    with torch.no_grad():
        assert again.eval()([torch.randn(1, 8, 8, 8), torch.randn(1, 8, 4, 4)]) is not None
