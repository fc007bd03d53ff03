"""What a conversion refuses, what it reports, and what can be done with its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

import vitdense
from vitdense import config as configs
from vitdense.cli import main
from vitdense.convert.classes import COCO, from_count, from_labels
from vitdense.convert.conversion import convert
from vitdense.convert.source import ConversionError
from vitdense.engine.checkpoint import load_model, read_meta

SAVED = Path("theirs")


def save_detr(**changes: Any) -> DetrForObjectDetection:
    torch.manual_seed(0)
    backbone = ResNetConfig(
        hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic", out_features=["stage4"]
    )
    options = dict(
        backbone_config=backbone,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=4,
        **({} if "id2label" in changes else {"num_labels": 3}),
    )
    theirs = DetrForObjectDetection(DetrConfig(**(options | changes))).eval()
    theirs.save_pretrained(SAVED)
    return theirs


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def edit(**changes: torch.Tensor | None) -> None:
    """Change the saved weights; None takes one out. `__` stands for a dot."""
    weights = load_file(SAVED / "model.safetensors")
    for name, tensor in changes.items():
        weights.pop(name.replace("__", "."), None)
        if tensor is not None:
            weights[name.replace("__", ".")] = tensor
    save_file(weights, SAVED / "model.safetensors", {"format": "pt"})


def test_says_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    save_detr()
    assert main(["convert", "theirs", "--out", "m.safetensors"]) == 0
    text = capsys.readouterr().out
    assert "theirs (transformers' DETR) -> m.safetensors" in text
    assert "backbone: " in text and "head: " in text and "tensors" in text
    assert "classes         3: LABEL_0, LABEL_1, LABEL_2" in text
    assert "re-initialised  nothing" in text


def test_what_is_left_over_or_missing_is_an_error_that_names_it() -> None:
    save_detr()
    edit(model__strange=torch.ones(1), bbox_predictor__layers__1__bias=None)
    with pytest.raises(ConversionError) as caught:
        convert("theirs", "m.safetensors")
    text = str(caught.value)
    assert "left over       model.strange: would be head.strange, which the model has not" in text
    assert "missing         head.boxes.layers.1.bias" in text
    assert "--partial" in text and not Path("m.safetensors").exists()


def test_partial_converts_the_rest_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    save_detr()
    edit(model__strange=torch.ones(1), bbox_predictor__layers__1__bias=None)
    assert main(["convert", "theirs", "--out", "m.safetensors", "--partial"]) == 0
    text = capsys.readouterr().out
    assert "left out        model.strange" in text
    assert "re-initialised  head.boxes.layers.1.bias" in text
    load_model("m.safetensors")


def test_another_shape_is_named() -> None:
    save_detr()
    edit(bbox_predictor__layers__1__bias=torch.ones(7))
    with pytest.raises(
        ConversionError, match=r"is \[7\], and head\.boxes\.layers\.1\.bias is \[16"
    ):
        convert("theirs", "m.safetensors")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "maskformer"}, "model_type 'maskformer' is of no family"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ({"decoder_ffn_dim": 8}, "encoder_ffn_dim is 16 and decoder_ffn_dim 8"),
        ({"backbone_config": {"model_type": "x"}}, "its backbone is 'x'; known are timm_backbone"),
    ],
)
def test_configs_that_cannot_be_converted(changes: dict[str, Any], message: str) -> None:
    save_detr()
    file = SAVED / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ConversionError, match=message):
        convert("theirs", "m.safetensors")


def test_weights_of_no_family_are_refused() -> None:
    torch.save({"a": torch.ones(1)}, "x.pth")
    with pytest.raises(ConversionError, match=r"x\.pth: its names of weights is of no family"):
        convert("x.pth", "m.safetensors")


def test_the_command_line_says_it_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "nowhere", "--out", "m.safetensors"]) == 2
    assert capsys.readouterr().err == (
        "error: nowhere: there is no such file or folder, and it is no id of the hub\n"
    )


def test_out_must_be_a_safetensors_file() -> None:
    with pytest.raises(ValueError, match="out: m.pth must end in .safetensors"):
        convert("theirs", "m.pth")


def test_rows_of_unused_ids_are_cut() -> None:
    labels = {0: "N/A", 1: "cat", 2: "N/A", 3: "dog"}
    theirs = save_detr(id2label=labels, label2id={name: i for i, name in labels.items()})
    report = convert("theirs", "m.safetensors")
    assert "2: cat, dog; 2 rows without a class left out" in str(report)
    model, meta = load_model("m.safetensors")
    assert (meta.classes, meta.category_ids) == (["cat", "dog"], [1, 3])
    kept = theirs.class_labels_classifier.weight[[1, 3, 4]]  # and "no object"
    torch.testing.assert_close(model.head.classes.weight, kept)


def test_the_file_is_one_of_ours() -> None:
    save_detr()
    processor = {"size": {"shortest_edge": 64, "longest_edge": 96}, "image_mean": [0.1, 0.2, 0.3]}
    (SAVED / "preprocessor_config.json").write_text(json.dumps(processor))
    convert("theirs", "m.safetensors")
    meta = read_meta("m.safetensors")
    assert (meta.task, meta.classes) == ("detection", ["LABEL_0", "LABEL_1", "LABEL_2"])
    transforms = configs.loads(meta.config).data.transforms
    assert (transforms.name, transforms.options["size"]) == ("short_side", 64)
    predictor = vitdense.load("m.safetensors", device="cpu")
    assert predictor.model.backbone.mean == (0.1, 0.2, 0.3)
    image = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    answer = predictor(image)
    assert len(answer.scores) == 4 and answer.boxes[:, 2].max() <= 90


def test_predictions_are_those_of_transformers() -> None:
    """From a file of pixels to boxes in it, with transformers' own preparation and decoding."""
    detr = pytest.importorskip("transformers.models.detr.image_processing_pil_detr")
    theirs = save_detr()
    processor = detr.DetrImageProcessorPil(size={"height": 64, "width": 96})
    processor.save_pretrained(SAVED)
    convert("theirs", "m.safetensors")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    answer = vitdense.load("m.safetensors", device="cpu")(image)
    with torch.no_grad():
        outputs = theirs(**processor(image, return_tensors="pt"))
    (expected,) = processor.post_process_object_detection(outputs, 0.0, [(64, 96)])
    order = expected["scores"].argsort(descending=True)
    torch.testing.assert_close(answer.scores, expected["scores"][order], atol=1e-4, rtol=0)
    assert answer.labels.tolist() == expected["labels"][order].tolist()
    limit = torch.tensor([96.0, 64, 96, 64])
    boxes = expected["boxes"][order].clamp(min=0).minimum(limit)
    torch.testing.assert_close(answer.boxes, boxes, atol=1e-2, rtol=0)


def test_the_config_beside_it_starts_from_it() -> None:
    save_detr()
    convert("theirs", "models/m.safetensors")
    config = configs.load("models/m.yaml")
    assert config.train.init == Path("models/m.safetensors")
    assert config.model.options["head"].name == "detr"


def test_it_is_evaluated_and_trained_from(capsys: pytest.CaptureFixture[str]) -> None:
    save_detr(id2label={0: "star", 1: "N/A", 2: "Circle"}, label2id={"star": 0, "Circle": 2})
    convert("theirs", "m.safetensors")
    data = ["data.dataset={name: shapes, images: 6, size: 32}", "data.root=shapes", "device=cpu"]
    data += ["data.train=train", "data.val=val", "data.workers=0"]
    data += ["data.transforms={name: detection, size: 64}"]
    assert main(["eval", "m.safetensors", *data]) == 1  # it has two of the classes
    length = ["train.epochs=null", "train.steps=1", "train.batch_size=2", "train.pictures=0"]
    assert main(["train", "m.yaml", *data, *length, "output=run"]) == 0
    text = capsys.readouterr().err
    assert "kept 2 of 5 classes by name (case apart): circle, star" in text
    assert main(["eval", "run/model.safetensors"]) == 0
    assert "AP" in capsys.readouterr().out


def test_classes_of_coco() -> None:
    known = from_labels({"id2label": {i: COCO.get(i, "N/A") for i in range(91)}})
    assert (len(known.names), known.category_ids[-1], known.count) == (80, 90, 91)
    assert known == from_count(91)
    names = [{"airplane": "aeroplane", "tv": "tvmonitor"}.get(x, x) for x in COCO.values()]
    contiguous = from_labels({"id2label": {str(i): name for i, name in enumerate(names)}})
    assert contiguous.names[4] == "airplane" and contiguous.category_ids[-1] == 90
    assert contiguous == from_count(80)
    assert from_count(90).rows == [i - 1 for i in COCO]
    assert from_count(2).names == ["class 0", "class 1"]
