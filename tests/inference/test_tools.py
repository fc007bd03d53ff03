"""The commands `predict` and `eval`: what they write, print and refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitdense
from tests.inference.conftest import SEGMENTATION, save
from vitdense import cli
from vitdense import config as configs
from vitdense.config import ConfigError
from vitdense.data.base import DataError
from vitdense.data.shapes import ShapesDataset
from vitdense.engine.checkpoint import CheckpointError, read_meta
from vitdense.inference import tools
from vitdense.inference.files import ImageFile
from vitdense.inference.outputs import Detections, coco_results
from vitdense.inference.report import table, to_json
from vitdense.inference.score import score
from vitdense.inference.tools import evaluate, predict
from vitdense.structures import Prediction


@pytest.fixture
def photos(coco_root) -> Path:
    return coco_root / "images" / "val"


def test_detections(detector, coco_root, photos, tmp_path):
    predict(detector, [photos], tmp_path / "out", batch_size=2, device="cpu")
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == [*(f"photo_{i}.jpg" for i in range(4)), "predictions.json"]
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {result["image_id"] for result in results} == {100, 101, 102, 103}
    assert {result["category_id"] for result in results} <= {3, 7}
    expected = vitdense.load(detector, device="cpu")(photos / "photo_1.png")
    found = [result for result in results if result["image_id"] == 101]
    assert len(found) == len(expected.scores)
    x1, y1, x2, y2 = expected.boxes[0].tolist()
    assert found[0]["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=1e-3)
    assert found[0]["score"] == pytest.approx(expected.scores[0].item(), abs=1e-5)


def test_written_detections_score_as_evaluation_does(detector, coco_root, photos, tmp_path):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    predict(detector, [photos], tmp_path, device="cpu")
    file = coco_root / "annotations" / "instances_val.json"
    truth = COCO(str(file))
    judge = COCOeval(truth, truth.loadRes(str(tmp_path / "predictions.json")), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    numbers = evaluate(detector, overrides=["device=cpu"])
    assert numbers["AR100"] == pytest.approx(judge.stats[8], abs=1e-12)
    assert numbers["AP"] == pytest.approx(judge.stats[0], abs=1e-12)
    rescored = score("bbox", file, tmp_path / "predictions.json")
    assert {name: rescored[name] for name in ("AP", "AR100")} == pytest.approx(
        {name: numbers[name] for name in ("AP", "AR100")}, abs=1e-12
    )


def test_label_maps_have_the_labels_of_the_data_set(segmenter, photos, tmp_path):
    predict(segmenter, [photos], tmp_path, device="cpu")
    path = photos / "photo_3.png"
    labels = np.array(Image.open(tmp_path / "labels" / "photo_3.png"))
    expected = vitdense.load(segmenter, device="cpu")(path).semantic.numpy() + 1
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, expected)  # label 0 is "no class" in this data set
    assert (tmp_path / "photo_3.jpg").exists()
    assert not (tmp_path / "predictions.json").exists()


def test_written_label_maps_score_as_evaluation_does(tmp_path):
    """With the background as class 0, whose label is 0 in the files."""
    data = ShapesDataset(tmp_path, "val", task="semantic", images=24, size=64)
    options = "{{name: shapes, task: semantic, images: 24, size: 64}}"
    text = SEGMENTATION.replace("dataset: ade20k", f"dataset: {options}").format(root=tmp_path)
    text = text.replace("training", "train").replace("validation", "val")
    model = save(tmp_path / "model.safetensors", text, data.classes, data.category_ids)
    predict(model, [data.folder / "images/val"], tmp_path / "out", device="cpu")
    expected = evaluate(model, overrides=["device=cpu"])
    assert expected["mIoU"] > 0 and "IoU/background" in expected
    truth = data.folder / "annotations/val"
    assert score("semantic", truth, tmp_path / "out") == pytest.approx(expected, abs=1e-12)


def test_subfolders_are_kept(segmenter, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "in" / "city")
    predict(segmenter, [tmp_path / "in"], tmp_path / "out", device="cpu")
    assert (tmp_path / "out" / "city" / "photo_0.jpg").exists()
    assert (tmp_path / "out" / "labels" / "city" / "photo_0.png").exists()


@pytest.mark.parametrize("out", ["set", "set/images", "set/images/val", "set/images/val/out"])
def test_nothing_is_written_above_the_images(detector, photos, tmp_path, capsys, out):
    """Pictures would take their place, label maps that of the truth, and be predicted next time."""
    folder = tmp_path / "set/images/val"
    shutil.copytree(photos, folder)
    (folder / "out").mkdir()
    shutil.copy(photos / "photo_0.png", folder / "out" / "earlier.jpg")
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*.*"))}
    command = ["predict", str(detector), str(folder), "--out", str(tmp_path / out)]
    assert cli.main(command) == 2
    assert f"error: out: {tmp_path / out} holds " in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in sorted(tmp_path.rglob("*.*"))}


def test_a_photo_on_its_side_is_turned_where_its_truth_was(detector, tmp_path, capsys):
    """As in evaluation, so that the written boxes are in the pixels of the truth."""
    folder = tmp_path / "val"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((40, 60, 3), dtype=np.uint8)).save(folder / "a.jpg", exif=exif)
    listed = [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 60}]
    (folder / "_annotations.coco.json").write_text(json.dumps({"images": listed}))
    predict(detector, [folder], tmp_path / "turned", device="cpu")
    picture = Image.open(tmp_path / "turned/a.jpg")
    assert picture.height > picture.width
    assert "as they are stored" not in capsys.readouterr().err
    (folder / "_annotations.coco.json").unlink()
    predict(detector, [folder], tmp_path / "out", device="cpu")
    picture = Image.open(tmp_path / "out/a.jpg")
    assert picture.height < picture.width
    told = capsys.readouterr().err
    assert "1 of them are photos taken as they are stored" in told and str(folder / "a.jpg") in told


def test_unreadable_images_are_left_out_and_told(detector, photos, tmp_path, capsys):
    folder = tmp_path / "in"
    shutil.copytree(photos, folder)
    whole = (folder / "photo_1.png").read_bytes()
    (folder / "photo_1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("no image")
    status = cli.main(["predict", str(detector), str(folder), "--out", str(tmp_path / "out")])
    told = capsys.readouterr().err
    assert status == 1
    assert "2 of 5 images were left out" in told
    assert "photo_1.png" in told and "text.jpg: not an image" in told
    assert (tmp_path / "out" / "photo_3.jpg").exists()
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {result["image_id"] for result in results} == {"photo_0", "photo_2", "photo_3"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 1.5}, "threshold: 1.5"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"out": __file__}, "out: .* is a file"),
        ({"inputs": ["nowhere"]}, "nowhere: no such file or folder"),
        ({"model_path": "nowhere.safetensors"}, "nowhere.safetensors: not found"),
    ],
)
def test_predict_refuses(detector, photos, tmp_path, change, message):
    arguments = {"model_path": detector, "inputs": [photos], "out": tmp_path / "out"}
    with pytest.raises((ValueError, DataError, CheckpointError), match=message):
        predict(**(arguments | change))


def test_evaluate_a_model(segmenter, tmp_path, capsys):
    numbers = evaluate(segmenter, overrides=["device=cpu"], json_path=tmp_path / "a" / "n.json")
    printed = capsys.readouterr().out
    assert "mIoU" in printed and "sky" in printed and "4 images" in printed
    written = json.loads((tmp_path / "a" / "n.json").read_text())
    assert written.keys() == numbers.keys()
    assert written["mIoU"] == numbers["mIoU"]
    assert 0 < numbers["mIoU"] < 1


def test_evaluate_a_config_finds_the_model_of_its_run(segmenter, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(read_meta(segmenter).config)
    run = f"output={tmp_path / 'run'}"
    with pytest.raises(CheckpointError, match="there is no model; train it with `vitdense train"):
        evaluate(config, overrides=[run])
    shutil.copytree(segmenter.parent, tmp_path / "run")
    found = evaluate(config, overrides=[run])
    assert found == evaluate(config, weights=segmenter)


def test_overrides_reach_a_model(segmenter, label_root, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(label_root, moved)
    name = sorted((moved / "images" / "validation").iterdir())[0]
    name.unlink()
    numbers = evaluate(segmenter, overrides=[f"data.root={moved}"])
    assert numbers["mIoU"] != evaluate(segmenter)["mIoU"]
    with pytest.raises(ConfigError, match="data.rot"):
        evaluate(segmenter, overrides=["data.rot=x"])


def test_evaluate_refuses_other_classes(segmenter, label_root, tmp_path):
    shutil.copytree(label_root, tmp_path / "other")
    (tmp_path / "other" / "classes.txt").write_text("sky\nroad\nriver\n")
    with pytest.raises(DataError, match="only one of them has river, tree"):
        evaluate(segmenter, overrides=[f"data.root={tmp_path / 'other'}"])
    (tmp_path / "other" / "classes.txt").write_text("road\nsky\ntree\n")
    with pytest.raises(DataError, match="order differs"):
        evaluate(segmenter, overrides=[f"data.root={tmp_path / 'other'}"])


def test_evaluate_refuses_weights_beside_a_model(segmenter, detector):
    with pytest.raises(ValueError, match="weights: .* has its own"):
        evaluate(segmenter, weights=detector)


def test_commands_from_the_command_line(segmenter, tmp_path, capsys):
    out = tmp_path / "numbers.json"
    assert cli.main(["eval", str(segmenter), "--json", str(out), "train.batch_size=2"]) == 0
    assert "mIoU" in capsys.readouterr().out
    assert json.loads(out.read_text())["mIoU"] > 0
    assert cli.main(["eval", str(tmp_path / "none.safetensors")]) == 2
    assert "none.safetensors: not found" in capsys.readouterr().err


def test_numbers_are_written_before_they_are_printed(segmenter, tmp_path, monkeypatch):
    """`vitdense eval model --json numbers.json | head -1` must not lose them."""

    def hang_up(numbers: dict[str, float]) -> str:
        raise BrokenPipeError

    monkeypatch.setattr(tools, "table", hang_up)
    out = tmp_path / "numbers.json"
    with pytest.raises(BrokenPipeError):
        evaluate(segmenter, overrides=["train.batch_size=2"], json_path=out)
    assert json.loads(out.read_text())["mIoU"] > 0


def test_table():
    numbers = {"mIoU": 0.5, "aAcc": float("nan"), "IoU/cat": 0.25, "Acc/cat": 1.0, "IoU/dog": 0.75}
    assert table(numbers).splitlines() == [
        "mIoU  0.5000",
        "aAcc  -",
        "",
        "class     IoU     Acc",
        "cat    0.2500  1.0000",
        "dog    0.7500       -",
    ]
    assert json.loads(to_json(numbers))["aAcc"] is None


def test_configs_of_models_are_whole(detector):
    config = configs.loads(read_meta(detector).config)
    assert config.model.options["head"].options["queries"] == 20


@pytest.mark.parametrize("sizes", [(), (0,), (2,), (0, 3, 0, 1)])
def test_detections_of_all_images_are_one_list(tmp_path, sizes):
    writer, expected = Detections(tmp_path, [3, 7]), []
    for image, size in enumerate(sizes):
        answer = Prediction(
            scores=torch.rand(size),
            labels=torch.arange(size) % 2,
            boxes=torch.rand(size, 4).cumsum(1),
            masks=torch.rand(size, 5, 6) > 0.5,
        )
        writer.add(ImageFile(Path(f"{image}.jpg"), str(image), image), answer)
        expected += coco_results(answer, image, [3, 7])
        for found, label, box in zip(
            expected[-size:] if size else [], answer.labels, answer.boxes, strict=True
        ):
            assert found["category_id"] == [3, 7][label]
            assert found["bbox"] == [*box[:2].tolist(), *(box[2:].double() - box[:2]).tolist()]
    assert json.loads(writer.close().read_text()) == expected
