"""Batch norms as constants: the same numbers in evaluation, and no other ones in training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitdense.backbones.timm import TimmBackbone


def backbone(frozen_norms: bool) -> TimmBackbone:
    torch.manual_seed(0)
    return TimmBackbone(model="test_resnet", frozen_norms=frozen_norms)


def test_maps_are_those_of_evaluation_in_both_modes() -> None:
    plain, frozen = backbone(False), backbone(True)
    for name, buffer in plain.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            nn.init.uniform_(buffer, 0.5, 1.5)
    frozen.load_state_dict(
        {name: x for name, x in plain.state_dict().items() if "num_batches" not in name}
    )
    images = torch.randn(2, 3, 64, 64)
    expected = plain.eval()(images)
    torch.testing.assert_close(frozen.eval()(images), expected)
    torch.testing.assert_close(frozen.train()(images), expected)


def test_norms_do_not_learn_and_convolutions_do() -> None:
    model = backbone(True)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    names = {name for name, _ in model.named_parameters()}
    assert "model.conv1.weight" in names or "model.conv1.0.weight" in names
    assert not any(".bn" in name for name in names)
    assert set(model.layer_depths()) == names


def test_a_model_without_batch_norms_is_refused() -> None:
    with pytest.raises(ValueError, match="frozen_norms: vit_tiny_patch16_224 has no batch norms"):
        TimmBackbone(model="vit_tiny_patch16_224", options={"depth": 1}, frozen_norms=True)
