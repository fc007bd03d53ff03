"""A loaded model answers as evaluation did, whatever form an image has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vitdense
from vitdense import config as configs
from vitdense.data.base import DataError
from vitdense.data.loader import evaluation_loader
from vitdense.engine.checkpoint import CheckpointError, load_model
from vitdense.structures import Prediction

ROOT = Path(__file__).parents[2]


def same(first: Prediction, second: Prediction, exact: bool = True) -> bool:
    for name in ("scores", "labels", "boxes", "masks", "semantic"):
        a, b = getattr(first, name), getattr(second, name)
        if a is None or b is None:
            if a is not b:
                return False
        elif not (torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-3, atol=1e-3)):
            return False
    return True


@pytest.mark.parametrize("kind", ["detector", "segmenter"])
def test_predictions_are_those_of_evaluation(kind, request):
    """Read by the data set, prepared by its loader, answered by the bare model."""
    path = request.getfixturevalue(kind)
    predictor = vitdense.load(path, device="cpu")
    model, meta = load_model(path)
    data = configs.loads(meta.config).data
    dataset = data.dataset(data.root, data.val)
    loader = evaluation_loader(dataset, data.transforms(), 1, model.divisor, workers=0)
    count = 0
    for batch in loader:
        with torch.no_grad():
            expected = model.predict(model(batch.images), batch.frames)[0]
        assert same(predictor(batch.paths[0]), expected)
        count += 1
    assert count == len(dataset) == 4


@pytest.mark.parametrize("kind", ["detector", "segmenter"])
def test_every_form_of_an_image(kind, request, coco_root):
    predictor = vitdense.load(request.getfixturevalue(kind), device="cpu")
    path = coco_root / "images" / "val" / "photo_0.png"
    image = Image.open(path).convert("RGB")
    array = np.array(image)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = predictor(path)
    for form in (str(path), image, array, tensor, image.convert("RGBA")):
        assert same(predictor(form), expected)


def test_grey_images(segmenter):
    predictor = vitdense.load(segmenter, device="cpu")
    grey = np.random.default_rng(0).integers(0, 256, (30, 40), dtype=np.uint8)
    expected = predictor(np.stack([grey] * 3, -1))
    for form in (grey, grey[..., None], torch.from_numpy(grey)[None], Image.fromarray(grey)):
        assert same(predictor(form), expected)


@pytest.mark.parametrize("kind", ["detector", "segmenter"])
def test_a_list_in_any_order_and_batch(kind, request, coco_root):
    """Images of several sizes: each answer is the image's own."""
    predictor = vitdense.load(request.getfixturevalue(kind), device="cpu")
    paths = sorted((coco_root / "images" / "val").iterdir())
    alone = [predictor(path) for path in paths]
    assert predictor([]) == []
    for batch_size in (1, 3, 8):
        together = predictor(paths[::-1], batch_size=batch_size)
        # Sums over batches of other sizes round differently.
        assert all(same(a, b, False) for a, b in zip(together[::-1], alone, strict=True))


def test_facts(detector, segmenter):
    predictor = vitdense.load(detector, device="cpu")
    assert predictor.classes == ["cat", "dog"]
    assert predictor.category_ids == [3, 7]
    assert predictor.task == "detection"
    assert predictor.device == torch.device("cpu")
    assert not predictor.model.training
    assert vitdense.load(str(segmenter)).task == "semantic"


def test_answers_are_in_original_pixels(detector, segmenter):
    image = torch.zeros(3, 90, 130, dtype=torch.uint8)
    boxes = vitdense.load(detector, device="cpu")(image).boxes
    assert (boxes >= 0).all() and (boxes <= torch.tensor([130, 90, 130, 90])).all()
    assert vitdense.load(segmenter, device="cpu")(image).semantic.shape == (90, 130)


@pytest.mark.parametrize("kind", ["detector", "segmenter"])
def test_draw(kind, request, coco_root):
    predictor = vitdense.load(request.getfixturevalue(kind), device="cpu")
    path = coco_root / "images" / "val" / "photo_0.png"
    drawn = predictor.draw(path, predictor(path), threshold=0.0)
    original = Image.open(path).convert("RGB")
    assert drawn.size[0] >= original.size[0]
    assert np.array(drawn).shape != np.array(original).shape or not np.array_equal(
        np.array(drawn), np.array(original)
    )


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), "image: must be uint8"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "three dimensions"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), "takes 3 channels"),
        (np.zeros((0, 8, 3), np.uint8), "takes 3 channels"),
        (object(), "a object is none"),
    ],
)
def test_what_is_no_image(segmenter, image, message):
    with pytest.raises(ValueError, match=message):
        vitdense.load(segmenter, device="cpu")(image)


def test_what_is_no_image_in_a_list_is_named_by_its_place(segmenter):
    grey, odd = np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8)
    with pytest.raises(ValueError, match=r"^images\[2\]: the model takes 3 channels"):
        vitdense.load(segmenter, device="cpu")([grey, grey, odd], batch_size=1)


def test_a_batch_size_is_at_least_1(segmenter):
    predictor = vitdense.load(segmenter, device="cpu")
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"^batch_size: {size} must be at least 1"):
            predictor([np.zeros((8, 8), np.uint8)], batch_size=size)
    assert predictor([]) == []


def test_missing_files(segmenter, tmp_path):
    with pytest.raises(DataError, match="absent.jpg: no such file"):
        vitdense.load(segmenter, device="cpu")(tmp_path / "absent.jpg")
    with pytest.raises(CheckpointError, match="not found"):
        vitdense.load(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="is a folder; name the model.safetensors in it"):
        vitdense.load(tmp_path)
    with pytest.raises(ValueError, match="device: cuda:77"):
        vitdense.load(segmenter, device="cuda:77")


def test_load_is_light_until_it_is_called():
    code = "import sys; from vitdense import load; print('torch' in sys.modules, load.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "load"], done.stderr
