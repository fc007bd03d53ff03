"""The best of many candidates: exactly those of a stable sort."""

from __future__ import annotations

import pytest
import torch

from vitdense.heads.detection.queries import best_first


@pytest.mark.parametrize("count", [1, 7, 100, 2000])
def test_the_best_are_those_of_a_stable_sort(count):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 1000, generator=generator).mul(4).sigmoid()
    scores[1] = scores[1].mul(20).round() / 20  # many ties, zeros and ones among them
    scores[2] = 0.0
    found, places = best_first(scores, count)
    values, order = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(found, values[:, :count])
    assert torch.equal(places, order[:, :count])


def test_the_smallest_and_the_largest_numbers_keep_their_order():
    scores = torch.tensor([[0.0, 1e-45, 1e-38, 1.0, 1 - 2**-24, 1.0]])
    assert best_first(scores, 6)[1].tolist() == [[3, 5, 4, 2, 1, 0]]


def test_a_fault_is_answered_first():
    scores = torch.tensor([[0.3, torch.nan, 1.0]])
    assert best_first(scores, 1)[1].tolist() == [[1]]
