"""`presnet` is ResNet-D with one more shortcut; test_rtdetr_family.py holds it to its peer."""

from __future__ import annotations

import pytest

from vitdense.backbones.presnet import PResNetBackbone

SMALL = {"layers": [1, 1, 1, 1]}


def test_first_shortcut_is_frozen_with_its_stage_and_norms():
    backbone = PResNetBackbone(options=SMALL, frozen=1, frozen_norms=True)
    shortcut = backbone.model.layer1[0].downsample
    assert [type(x).__name__ for x in shortcut] == ["Identity", "Conv2d", "FrozenBatchNorm2d"]
    assert not shortcut[1].weight.requires_grad
    assert backbone.model.layer2[0].conv1.weight.requires_grad
    assert [level.stride for level in backbone.levels] == [4, 8, 16, 32]


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="model: resnet26d is no ResNet of basic blocks"):
        PResNetBackbone(model="resnet26d")
