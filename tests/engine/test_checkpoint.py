"""Files that a run keeps: whole, safe to load, clear when wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from vitdense.config import Part
from vitdense.engine import checkpoint, pictures
from vitdense.engine.checkpoint import CheckpointError, Meta

META = Meta("seed: 0\n", ["cat", "dog"], [3, 7], "semantic", 12, {"mIoU": 0.5, "x": None}, "0.1")


def test_model_and_meta_come_back(tiny_model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "runs" / "model.safetensors"
    checkpoint.save_model(path, tiny_model, META)
    assert checkpoint.read_meta(path) == META
    weights = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    nn.init.zeros_(tiny_model.head.weight)  # type: ignore[union-attr, arg-type]
    checkpoint.load_weights(path, tiny_model)
    for name, value in tiny_model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_shared_and_transposed_weights_are_stored(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[2].weight = nn.Parameter(torch.randn(4, 8).t()[:4])
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    checkpoint.save_model(tmp_path / "m.safetensors", model, META)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    checkpoint.load_weights(tmp_path / "m.safetensors", model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_other_models_weights_are_refused(tiny_model: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save_model(path, tiny_model, META)
    other = type(tiny_model)(num_classes=5)
    with pytest.raises(CheckpointError, match=r"head.bias is \[3\] in the file, \[5\] in"):
        checkpoint.load_weights(path, other)
    other.extra = nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match="extra.bias is missing"):
        checkpoint.load_weights(path, other)


def test_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    with pytest.raises(CheckpointError, match="other.safetensors: not found"):
        checkpoint.load_model(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="was not written by vitdense.*backbone.weights"):
        checkpoint.load_model(path)
    path.write_bytes(b"no tensors here")
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        checkpoint.load_model(path)


def test_state_is_loaded_without_running_code(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    with pytest.raises(CheckpointError, match="not found"):
        checkpoint.load_state(path)
    torch.save({"model": nn.Linear(1, 1)}, path)
    with pytest.raises(CheckpointError, match="is no checkpoint of vitdense"):
        checkpoint.load_state(path)


def test_a_picture_is_never_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pictures" / "step_000002.jpg"
    pictures._write(torch.zeros(3, 8, 8, dtype=torch.uint8), path)
    whole = path.read_bytes()

    def breaks(self: Image.Image, place: Path, *args: Any, **options: Any) -> None:
        Path(place).write_bytes(whole[:50])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", breaks)
    with pytest.raises(CheckpointError, match="No space left"):
        pictures._write(torch.ones(3, 8, 8, dtype=torch.uint8), path)
    assert path.read_bytes() == whole and len([*path.parent.iterdir()]) == 1


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    checkpoint.write_state(path, {"step": 1})

    def write(partial: Path) -> None:
        partial.write_bytes(b"half of it")
        raise OSError("disk full")

    with pytest.raises(CheckpointError, match=r"state.pt: cannot be written: disk full"):
        checkpoint.write_atomic(path, write)
    assert [item.name for item in tmp_path.iterdir()] == ["state.pt"]
    assert checkpoint.load_state(path) == {"step": 1}


def test_nothing_is_fetched_when_loading() -> None:
    backbone = Part("backbone", "timm", {"model": "vit", "pretrained": True, "weights": "a.pth"})
    head = Part("head", "mine", {"weights": [1.0], "pretrained": True})
    model = Part("model", "pyramid", {"backbone": backbone, "head": head})
    blank = checkpoint.without_weights(model)
    found = blank.options["backbone"].options
    assert found == {"model": "vit", "pretrained": False, "weights": None}
    assert blank.options["head"] == head


def test_metadata_is_plain_text(tiny_model: nn.Module, tmp_path: Path) -> None:
    """What other tools read: the header of safetensors is JSON."""
    path = tmp_path / "model.safetensors"
    checkpoint.save_model(path, tiny_model, META)
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["__metadata__"]["config"] == "seed: 0\n"
    assert json.loads(header["__metadata__"]["vitdense"])["classes"] == ["cat", "dog"]
