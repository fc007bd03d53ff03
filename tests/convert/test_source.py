"""Reading what others wrote, and refusing to run what they hid in it."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vitdense.convert.source import ConversionError, read
from vitdense.engine.checkpoint import FORMAT

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.ones(2)}


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("pwned",)


def same(found: dict[str, torch.Tensor]) -> None:
    assert found.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        torch.testing.assert_close(found[name], tensor)


def test_a_sharded_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "detr"}')
    (tmp_path / "preprocessor_config.json").write_text('{"size": 9}')
    files = {name: f"model-{i}.safetensors" for i, name in enumerate(WEIGHTS)}
    for name, file in files.items():
        save_file({name: WEIGHTS[name]}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    source = read(str(tmp_path))
    same(source.weights)
    assert source.model_type == "detr" and source.preprocessor == {"size": 9}


def test_a_folder_of_older_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "detr"}')
    torch.save(WEIGHTS, tmp_path / "pytorch_model.bin")
    same(read(str(tmp_path)).weights)


def test_a_file_beside_its_config(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "detr"}')
    source = read(str(tmp_path / "model.safetensors"))
    same(source.weights)
    assert source.model_type == "detr"


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        {"model": WEIGHTS, "epoch": 3},
        {"state_dict": {f"module.{name}": x for name, x in WEIGHTS.items()}},
        {"model": {"a.weight": torch.zeros(1)}, "ema": {"module": WEIGHTS, "updates": 5}},
    ],
)
def test_a_training_state(content: dict[str, Any], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pth")
    same(read(str(tmp_path / "model.pth")).weights)


def test_arguments_beside_the_weights(tmp_path: Path) -> None:
    arguments = argparse.Namespace(num_queries=300, backbone="swin")
    torch.save({"model": WEIGHTS, "args": arguments}, tmp_path / "model.pth")
    source = read(str(tmp_path / "model.pth"))
    same(source.weights)
    assert source.config == {"num_queries": 300, "backbone": "swin"} and source.model_type is None


def test_arrays_of_detectron2(tmp_path: Path) -> None:
    arrays = {name: tensor.numpy() for name, tensor in WEIGHTS.items()}
    content = {"model": arrays, "__author__": "Detectron2", "steps": np.float64(3)}
    for protocol in (2, 4, 5):
        (tmp_path / "model.pkl").write_bytes(pickle.dumps(content, protocol))
        same(read(str(tmp_path / "model.pkl")).weights)


@pytest.mark.parametrize("name", ["model.pkl", "model.pth", "model.bin"])
def test_code_in_a_file_is_not_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"model": WEIGHTS, "more": Evil()}
    if name.endswith("pkl"):
        Path(name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, name)
    with pytest.raises(ConversionError, match=rf"{name}: .*(nothing in it was run|running code)"):
        read(name)
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "has no config.json"),
        ({"config.json": "{}"}, "has neither model.safetensors nor pytorch_model.bin"),
        ({"config.json": "{"}, "is no JSON"),
        ({"config.json": "{}", "model.safetensors": "x"}, "is no safetensors file"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(
    files: dict[str, str], message: str, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConversionError, match=message):
        read(str(tmp_path))


def test_a_state_without_weights_is_refused(tmp_path: Path) -> None:
    torch.save({"model": {"epoch": 3}}, tmp_path / "model.pth")
    with pytest.raises(ConversionError, match="holds no weights"):
        read(str(tmp_path / "model.pth"))


@pytest.mark.parametrize("content", [b"", b"model: {name: pyramid}\n"])
def test_what_is_no_file_of_weights(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ConversionError, match=r"x\.pth: is no file of weights \(.+\)$"):
        read(str(tmp_path / "x.pth"))


def test_a_whole_module_names_what_would_be_run(tmp_path: Path) -> None:
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "x.pt")
    with pytest.raises(ConversionError, match=r"it wants torch\.nn\.modules\.linear\.Linear; save"):
        read(str(tmp_path / "x.pt"))


def test_a_model_of_ours_is_said_to_be_one(tmp_path: Path) -> None:
    meta = {"classes": [], "category_ids": [], "task": "semantic", "step": 0, "metrics": {},
            "version": ""}  # fmt: skip
    path = tmp_path / "model.safetensors"
    save_file(WEIGHTS, path, {FORMAT: json.dumps(meta), "config": ""})
    with pytest.raises(ConversionError, match="is a model of vitdense already"):
        read(str(path))


def test_nothing_there() -> None:
    with pytest.raises(ConversionError, match="no such file or folder"):
        read("not/there/at/all")


class Hub:
    """Stands for the hub's client: a folder, and what happens to files that it has not."""

    def __init__(self, folder: Path, error: Exception) -> None:
        self.folder, self.error = folder, error

    def __call__(self, repo: str, file: str) -> str:
        if not (self.folder / file).exists():
            raise self.error
        return str(self.folder / file)


def entry_not_found() -> Exception:
    from huggingface_hub.errors import EntryNotFoundError

    return EntryNotFoundError.__new__(EntryNotFoundError)


def test_an_id_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "detr"}')
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", Hub(tmp_path, entry_not_found()))
    source = read("owner/model")
    same(source.weights)
    assert (source.name, source.model_type) == ("owner/model", "detr")


def test_an_id_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path, OSError("cannot reach the hub"))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    with pytest.raises(ConversionError, match=r"owner/model: .*cannot reach the hub.*HF_HUB_CACHE"):
        read("owner/model")
