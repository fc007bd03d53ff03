"""Sine embeddings equal those of transformers' DETR and Deformable DETR."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrSinePositionEmbedding,
)
from transformers.models.detr.modeling_detr import DetrSinePositionEmbedding

from vitdense.layers.position import box_embedding, sine_embedding, sine_position


@pytest.mark.parametrize("size", [(5, 7), (1, 9), (20, 20)])
@pytest.mark.parametrize(
    "reference, offset",
    [(DetrSinePositionEmbedding, 0), (DeformableDetrSinePositionEmbedding, -0.5)],
)
def test_positions_equal_transformers(reference, offset, size):
    mask = torch.ones(1, *size, dtype=torch.bool)
    expected = reference(16, normalize=True)(
        shape=torch.Size([1, 32, *size]), device="cpu", dtype=torch.float64, mask=mask
    )
    positions = sine_position(*size, 32, offset=offset, like=torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(positions, expected[0].flatten(1).T, atol=1e-12, rtol=0)


def test_embedding_pairs_sine_and_cosine_of_falling_frequency():
    angles = sine_embedding(torch.tensor([0.7]), 4, temperature=100)[0]
    expected = [math.sin(0.7), math.cos(0.7), math.sin(0.07), math.cos(0.07)]
    torch.testing.assert_close(angles, torch.tensor(expected))


def test_box_embedding_keeps_the_order_of_coordinates():
    boxes = torch.rand(2, 3, 4)
    embedded = box_embedding(boxes, 8)
    assert embedded.shape == (2, 3, 32)
    for i in range(4):
        expected = sine_embedding(boxes[..., i] * 2 * math.pi, 8)
        torch.testing.assert_close(embedded[..., 8 * i : 8 * i + 8], expected)
