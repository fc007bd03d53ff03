"""Two splits that are right each for itself, but not together, are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from vitdense import config as configs
from vitdense.engine.build import build_data

CONFIG = """
model: {{backbone: resnet18, head: rtdetr}}
data:
  dataset: {{name: coco, annotations: "{{split}}.json", images: "."}}
  root: {root}
  transforms: {{name: detection, size: 64}}
train: {{steps: 1}}
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for split, shift in (("train", 0), ("val", 10)):
        content = {
            "images": [{"id": 1, "file_name": "a.png", "width": 8, "height": 8}],
            "annotations": [],
            "categories": [
                {"id": k + shift, "name": name} for k, name in enumerate(("cat", "dog"))
            ],
        }
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    return tmp_path


def told(root: Path, caplog: pytest.LogCaptureFixture, *changes: str) -> str:
    caplog.clear()
    build_data(configs.loads(CONFIG.format(root=root), "test.yaml", changes))
    return caplog.text


def test_other_ids_of_the_same_classes(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "have other ids for the same classes: predictions are written" in told(root, caplog)
    (root / "val.json").write_text((root / "train.json").read_text())
    assert "have other ids" not in told(root, caplog)


@pytest.mark.parametrize("change", ["data.val=train", "data.dataset.annotations=train.json"])
def test_the_same_images(root: Path, caplog: pytest.LogCaptureFixture, change: str) -> None:
    assert "are the same images" not in told(root, caplog)
    assert "are the same images: the numbers of an evaluation" in told(root, caplog, change)
