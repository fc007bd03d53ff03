"""Saved by transformers, converted by the command, compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitdense.cli import main
from vitdense.engine.checkpoint import load_model
from vitdense.models.base import Model

Convert = Callable[..., Model]


@pytest.fixture
def convert(tmp_path: Path) -> Convert:
    """Save a model of transformers, convert the folder by the command line, load what it wrote."""

    def run(theirs: Any, *options: str) -> Model:
        theirs.save_pretrained(tmp_path / "theirs")
        out = tmp_path / "ours" / "model.safetensors"
        assert main(["convert", str(tmp_path / "theirs"), "--out", str(out), *options]) == 0
        return load_model(out)[0]

    return run


@pytest.fixture
def scatter() -> Callable[[nn.Module], None]:
    """Weights and statistics that tell every parameter apart."""
    return _scatter


@pytest.fixture
def check_parity() -> Callable[..., None]:
    """Equal logits and boxes, in float32 and in float64."""
    return _check_parity


def _scatter(model: nn.Module, std: float = 0.2) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 1.5)
        elif name.endswith(("running_mean", "bias")):
            nn.init.normal_(buffer, std=0.1)
        elif name.endswith("weight"):
            nn.init.uniform_(buffer, 0.5, 1.5)


def _outputs(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and boxes of our last layer for normalised pixels."""
    features = model.backbone(pixels)
    features = model.neck(features) if model.neck is not None else features
    found = model.head(features)
    return found.logits[-1], found.boxes[-1]


def _check_parity(ours: Model, theirs: nn.Module, pixels: Tensor, atol64: float = 1e-8) -> None:
    theirs.eval()
    for dtype, atol in ((torch.float32, 1e-4), (torch.float64, atol64)):
        mine, other = copy.deepcopy(ours).to(dtype).eval(), copy.deepcopy(theirs).to(dtype).eval()
        with torch.no_grad():
            logits, boxes = _outputs(mine, pixels.to(dtype))
            expected = other(pixels.to(dtype))
        assert logits.std() > 0.01
        torch.testing.assert_close(logits, expected.logits, atol=atol, rtol=0)
        torch.testing.assert_close(boxes, expected.pred_boxes, atol=atol, rtol=0)


@pytest.fixture
def check_names_of_memory(convert: Convert, tmp_path: Path) -> Callable[[Any], None]:
    """The same model from a file with the names that transformers 5 has in memory alone."""

    def check(theirs: Any) -> None:
        ours = convert(theirs).state_dict()
        saved = tmp_path / "theirs" / "model.safetensors"
        state = {name: value.contiguous() for name, value in theirs.state_dict().items()}
        assert load_file(saved).keys() != state.keys()
        save_file(state, saved, {"format": "pt"})
        again = tmp_path / "again.safetensors"
        assert main(["convert", str(tmp_path / "theirs"), "--out", str(again)]) == 0
        found = load_model(again)[0].state_dict()
        assert all(torch.equal(found[name], ours[name]) for name in ours)

    return check
