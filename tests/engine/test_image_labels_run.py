"""From a file of image labels to a model that answers both questions, and to all that uses it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitdense
from vitdense import config as configs
from vitdense.config import Config, ConfigError
from vitdense.data.base import DataError
from vitdense.data.geometry import resize
from vitdense.engine import build, checkpoint
from vitdense.engine.check import check
from vitdense.engine.train import train
from vitdense.inference.tools import evaluate, predict
from vitdense.ops.draw import draw
from vitdense.structures import Prediction, Target

TEXT = """
model:
  backbone: {name: timm, model: test_resnet, in_chans: 1}
  head: {name: linear, norm: group}
  image_head: mean
data:
  dataset: {name: ade20k, reduce_zero_label: false}
  root: ROOT
  image_labels: labels.csv
  transforms: {name: segmentation, size: 32, crop: 32, scale: [1.0, 1.0], photometric: 0}
  workers: 0
train: {steps: 40, batch_size: 8, evaluations: 1, pictures: 1}
optimizer: {lr: 4e-3}
output: ROOT/run
device: cpu
"""
STRIPES = ("across", "along", "none")
"""Of grey images: which way they run."""

Make = Callable[..., Config]


def write_set(root: Path) -> None:
    """Stripes of two directions or noise, and a bright or a dark side."""
    generator = np.random.default_rng(0)
    rows = []
    for split, count in (("train", 24), ("val", 9)):
        for index in range(count):
            kind, stem = STRIPES[index % 3], f"{split}_{index}"
            wave = np.tile(40 * np.sign(np.sin(np.arange(32) * 0.8)), (32, 1))
            noise = generator.normal(0, 40, (32, 32))
            wave = {"across": wave, "along": wave.T, "none": noise}[kind]
            labels = np.zeros((32, 32), dtype=np.uint8)
            labels[:, index % 2 * 16 :][:, :16] = 1
            pixels = np.clip(90 + 60 * labels + wave, 0, 255).astype(np.uint8)
            for folder, image in (("images", pixels), ("labels", labels)):
                path = root / folder / split / f"{stem}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path)
            rows.append([f"{stem}.png", "" if kind == "none" else f"{kind};striped"])
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "label"], *rows])
    (root / "classes.txt").write_text("dark\nbright\n")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stripes")
    write_set(root)
    return root


def make(root: Path, *overrides: str) -> Config:
    return configs.loads(TEXT.replace("ROOT", str(root)), "stripes.yaml", overrides)


@pytest.fixture(scope="module")
def run(root: Path) -> dict[str, float]:
    return train(make(root))


@pytest.fixture
def model(root: Path, run: dict[str, float]) -> Path:
    return root / "run" / "model.safetensors"


def test_both_questions_are_learned(root: Path, run: dict[str, float]) -> None:
    assert run["image_mAP"] > 0.9 and run["image_acc"] > 0.9
    assert run["mIoU"] > 0.8
    names = {"image_acc", "image_mAP", *(f"image_AP/{it}" for it in ("across", "along", "striped"))}
    assert names <= json.loads((root / "run/results.json").read_text()).keys()
    records = [json.loads(line) for line in (root / "run/metrics.jsonl").read_text().splitlines()]
    losses = [record["loss/image"] for record in records if record["kind"] == "train"]
    assert losses[-1] < losses[0] / 2


def test_the_file_of_the_model_is_enough(root: Path, model: Path) -> None:
    meta = checkpoint.read_meta(model)
    assert meta.image_classes == ["across", "along", "striped"]
    predictor = vitdense.load(model, "cpu")
    assert predictor.image_classes == meta.image_classes
    answers = predictor([root / f"images/val/val_{i}.png" for i in range(3)])
    scores = torch.stack([answer.image_scores for answer in answers])
    across, along, noise = scores
    assert across[0] > max(along[0], noise[0]) and along[1] > max(across[1], noise[1])
    assert min(across[2], along[2]) > noise[2]
    assert answers[0].semantic.shape == (32, 32)


def test_eval_finds_the_numbers_of_training(
    root: Path, model: Path, run: dict[str, float], capsys: pytest.CaptureFixture
) -> None:
    numbers = evaluate(model)
    assert numbers == pytest.approx({name: run[name] for name in numbers})
    text = capsys.readouterr().out
    assert "image_mAP" in text and "label of images" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["across", f"{numbers['image_AP/across']:.4f}"] in rows
    without = evaluate(model, overrides=["data.image_labels=null"])
    assert not [name for name in without if name.startswith("image")]
    assert without["mIoU"] == numbers["mIoU"]


def test_eval_knows_labels_by_name(root: Path, model: Path, run: dict[str, float]) -> None:
    """A file that has but some of the labels, in another order of the alphabet."""
    text = "".join(
        f"val_{i},{'striped' if i % 3 < 2 else ''}{';along' * (i % 3 == 1)}\n" for i in range(9)
    )
    (root / "some.csv").write_text("image,label\n" + text)
    numbers = evaluate(model, overrides=["data.image_labels=some.csv"])
    assert {name for name in numbers if name.startswith("image_AP")} == {
        "image_AP/along",
        "image_AP/striped",
    }
    assert numbers["image_AP/along"] == run["image_AP/along"]
    (root / "others.csv").write_text(("image,label\n" + text).replace("striped", "dotted"))
    with pytest.raises(DataError, match="label 'dotted', which the model does not know"):
        evaluate(model, overrides=["data.image_labels=others.csv"])


def test_predict_writes_scores_that_can_be_read_as_labels(
    root: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    predict(model, [root / "images/val"], tmp_path, device="cpu")
    rows = list(csv.DictReader((tmp_path / "images.csv").open()))
    assert len(rows) == 9
    assert list(rows[0]) == ["image", "label", "across", "along", "striped"]
    row = next(row for row in rows if row["image"] == "val_0")
    scores = vitdense.load(model, "cpu")(root / "images/val/val_0.png").image_scores
    assert [float(row[k]) for k in ("across", "along", "striped")] == pytest.approx(scores.tolist())
    assert row["label"] == ["across", "along", "striped"][int(scores.argmax())]
    assert "images.csv" in capsys.readouterr().err
    (root / "found.csv").write_text((tmp_path / "images.csv").read_text())
    found = evaluate(model, overrides=["data.image_labels=found.csv"])
    assert found["image_acc"] == 1.0


@pytest.mark.parametrize("option", ["flip=true", "window=32", "scales=[1.0,0.5]"])
def test_windows_and_views_give_the_mean_score(model: Path, option: str) -> None:
    keep = "data.transforms.evaluation=keep"
    generator = torch.Generator().manual_seed(0)
    images = list(torch.randint(256, (5, 1, 64, 64), dtype=torch.uint8, generator=generator))
    answers = vitdense.load(model, "cpu", [keep, f"inference.{option}"])(images, batch_size=4)
    network = vitdense.load(model, "cpu").model
    for image, answer in zip(images, answers, strict=True):
        looks = {
            "flip=true": [image, image.flip(-1)],
            "window=32": [image[:, y:, x:][:, :32, :32] for y in (0, 32) for x in (0, 32)],
            "scales=[1.0,0.5]": [image, resize(image, (32, 32))],
        }[option]
        with torch.no_grad():
            found = [network.image_logits(network(look[None])) for look in looks]
        expected = torch.cat(found).sigmoid().mean(0)
        torch.testing.assert_close(answer.image_scores, expected, atol=1e-5, rtol=1e-4)


def test_check_says_what_there_is(root: Path) -> None:
    text = check(make(root))
    assert "3 labels of images: across, along, striped" in text
    assert "truth: semantic, image_labels" in text
    assert "loss/image" in text
    assert ["image_scores", "float32", "[3]"] in [line.split() for line in text.splitlines()]
    assert "MeanIoU and ImageLabels, the best model by mIoU" in text
    assert "tensors; none for" not in text


def test_labels_without_such_a_head_are_left_alone(root: Path) -> None:
    text = check(make(root, "model.image_head=null"))
    assert "loss/image" not in text and "image_scores" not in text
    assert "MeanIoU, the best model" in text


def test_a_head_without_labels_is_an_error_with_its_line(root: Path) -> None:
    config = make(root, "data.image_labels=null")
    with pytest.raises(ConfigError, match=r"stripes.yaml:5: model.image_head: the data has no"):
        build.build_model(config, build.build_data(config))


def test_an_image_without_a_row_stops_the_run_at_once(root: Path) -> None:
    lines = (root / "labels.csv").read_text().splitlines()
    (root / "short.csv").write_text("\n".join(lines[:-1]))
    with pytest.raises(DataError, match=r"short.csv: has no row for .*val_8.png \(1 of 9"):
        build.build_data(make(root, "data.image_labels=short.csv"))


def started(root: Path, *overrides: str) -> tuple[str, dict[str, torch.Tensor]]:
    config = make(root, *overrides)
    data = build.build_data(config)
    model = build.build_model(config, data)
    return str(build.start(config, data, model)), model.state_dict()


def test_fine_tuning_keeps_labels_by_name(root: Path, model: Path) -> None:
    text = (root / "labels.csv").read_text().replace("along", "upright").replace("across", "Across")
    (root / "new.csv").write_text(text)
    init = [f"train.init={model}", "data.image_labels=new.csv"]
    said, state = started(root, *init)
    assert "labels of images: kept Across, striped; new: upright" in said
    old = checkpoint.read_weights(model)
    rows = state["image_head.classifier.weight"]
    assert torch.equal(rows[[0, 1]], old["image_head.classifier.weight"][[0, 2]])
    assert torch.equal(state["image_head.norm.weight"], old["image_head.norm.weight"])
    assert all(torch.equal(state[name], old[name]) for name in old if name.startswith("head."))


def test_another_image_head_or_none_starts_anew(root: Path, model: Path) -> None:
    said, state = started(root, f"train.init={model}", "model.image_head=attention")
    assert "labels of images: the file has no such head, it starts anew" in said
    assert "kept 2 of 2 classes" in said
    assert "image_head.attention.weight" in state
    said, state = started(root, f"train.init={model}", "model.image_head=null")
    assert "labels of images" not in said
    assert not [name for name in state if name.startswith("image_head")]


def test_a_file_from_before_image_labels_still_loads(model: Path, tmp_path: Path) -> None:
    config = configs.loads(checkpoint.read_meta(model).config, "old", ["model.image_head=null"])
    plain = checkpoint.make_model(config.model, 2, 0)
    meta = replace(checkpoint.read_meta(model), config=configs.dump(config), image_classes=[])
    path = tmp_path / "old.safetensors"
    checkpoint.save_model(path, plain, meta)
    raw = path.read_bytes()
    assert raw.count(b', \\"image_classes\\": []') == 1
    gone = b', \\"image_classes\\": []'
    path.write_bytes(raw.replace(gone, b" " * len(gone)))
    assert checkpoint.read_meta(path).image_classes == []
    assert vitdense.load(path, "cpu").image_classes == []


def test_pictures_name_the_true_labels_and_the_likeliest() -> None:
    image, names = torch.zeros(3, 64, 96, dtype=torch.uint8), ["cat", "dog"]
    truth = Target(image_labels=torch.tensor([True, True]))
    answer = Prediction(image_scores=torch.tensor([0.2, 0.9]))
    for written in (truth, answer):
        picture = draw(image, written, ["sky"], labels=names)
        assert picture[:, :12, :20].float().mean() > 50 and not picture[:, 32:].any()
        assert not draw(image, written, ["sky"]).any()
    assert not draw(image, Target(image_labels=torch.zeros(2).bool()), ["sky"], labels=names).any()
