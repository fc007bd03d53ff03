"""What the tests of several detection heads share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vitdense.structures import Target


@pytest.fixture
def make_targets() -> Callable[..., list[Target]]:
    """Makes images with so many random objects of five classes each, within 84 x 64 pixels."""

    def make(*counts: int) -> list[Target]:
        targets = []
        for count in counts:
            start = torch.rand(count, 2) * torch.tensor([60.0, 40.0])
            boxes = torch.cat((start, start + 4 + torch.rand(count, 2) * 20), 1)
            targets.append(Target(labels=torch.randint(5, (count,)), boxes=boxes))
        return targets

    return make
