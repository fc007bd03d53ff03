"""The conformance kit knows what answers with masks, segments and label maps must look like."""

from __future__ import annotations

import pytest
import torch

from vitdense.structures import Frame, Prediction
from vitdense.testing.predictions import agreement, check_prediction, check_semantic_logits

SIZE = (6, 8)
FRAME = Frame(SIZE, SIZE, SIZE)


def fails(message: str):
    return pytest.raises(AssertionError, match=message)


def make_panoptic(*numbers: int, labels: int = 2) -> Prediction:
    panoptic = torch.zeros(SIZE, dtype=torch.long)
    panoptic.view(-1)[: len(numbers)] = torch.tensor(numbers)
    return Prediction(
        scores=torch.linspace(1, 0, labels),
        labels=torch.zeros(labels, dtype=torch.long),
        panoptic=panoptic,
    )


def make_instances(*columns: int) -> Prediction:
    masks = torch.zeros(len(columns), *SIZE, dtype=torch.bool)
    for mask, column in zip(masks, columns, strict=True):
        mask[:, column : column + 2] = True
    scores = torch.full((len(columns),), 0.5)
    return Prediction(scores, torch.zeros(len(columns), dtype=torch.long), masks=masks)


def test_segments():
    check_prediction("x", make_panoptic(2, 1, 0), "panoptic", FRAME, 3)
    check_prediction("x", make_panoptic(labels=0), "panoptic", FRAME, 3)
    with fails("segments .1. of 2 have no pixel"):
        check_prediction("x", make_panoptic(2, 0), "panoptic", FRAME, 3)
    with fails("panoptic must lie in 0..2"):
        check_prediction("x", make_panoptic(1, 2, 3), "panoptic", FRAME, 3)
    with fails("must hold"):
        check_prediction("x", make_instances(1), "panoptic", FRAME, 3)


def test_instances():
    check_prediction("x", make_instances(1, 4), "instance", FRAME, 3)
    wrong = make_instances(1)
    wrong.masks = wrong.masks.float()
    with fails("masks must be bool"):
        check_prediction("x", wrong, "instance", FRAME, 3)


def test_agreement_sees_masks():
    assert agreement(make_instances(1, 4), make_instances(4, 1)) == 1
    assert agreement(make_instances(1, 4), make_instances(1, 5)) == 0.5
    assert agreement(make_panoptic(1, 2), make_panoptic(2, 1)) == 1  # of one class
    assert agreement(make_panoptic(1, 2), make_panoptic(1, 2, 2)) < 1


def test_semantic_logits():
    check_semantic_logits("x", torch.zeros(2, 3, 3, 4), 2, 3, SIZE)
    for wrong, message in (
        (torch.zeros(2, 4, 3, 4), "must be float"),
        (torch.zeros(2, 3, 3, 4).long(), "must be float"),
        (torch.full((2, 3, 3, 4), torch.nan), "must be float"),
        (None, "must be float"),
        (torch.zeros(2, 3, 6, 6), "whole canvas"),
    ):
        with fails(message):
            check_semantic_logits("x", wrong, 2, 3, SIZE)
