"""Every way to masks learns four real photographs by heart, from their files to the metric.

Objects of seven of COCO's classes, a crowd among them, and stuff; 150 steps from random weights,
about two minutes of one thread of a CPU for each. Measured there: AP50 of masks 1.00 (eomt), 0.95
(mask2former), 1.00 (rtdetr); PQ 0.91 (eomt), 0.92 (mask2former), each with RQ 1.00.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitdense.config import loads
from vitdense.engine.train import train

COCO = Path(__file__).parents[3] / "shared/data/coco_open"
IMAGES = (73, 86, 208, 257)
SMALLEST = 32**2
"""Pixels of the smallest objects that stay: at a third of the size less is a pixel or two."""

EOMT = """{{name: eomt, task: {task}, queries: 60, blocks: 2, mask_points: 2048,
  score_threshold: 0.5, backbone: {{name: timm, model: vit_tiny_patch16_224, patch_size: 8,
  img_size: 192, options: {{depth: 6}}}}}}"""
MASK2FORMER = """{{backbone: pvt_v2_b0, head: {{name: mask2former, task: {task}, width: 96,
  heads: 4, encoder_layers: 1, encoder_ffn: 256, decoder_layers: 3, ffn: 256, queries: 60,
  mask_points: 2048, score_threshold: 0.5}}}}"""
RTDETR = """{{backbone: {{name: timm, model: pvt_v2_b0, out_indices: [0, 1, 2, 3]}},
  head: {{name: rtdetr, masks: true, width: 96, heads: 4, encoder_ffn: 256, blocks: 1, queries: 60,
          decoder_layers: 3, ffn: 256, mask_points: 1024, nms: 0.7}}}}"""

TEXT = """
model: {model}
data:
  dataset: {{name: {dataset}{options}}}
  root: {root}
  transforms:
    {{name: detection, size: 192, iou_crop: 0.0, zoom_out: 0.0, photometric: 0.0, flip: 0.0}}
  val: train
  workers: 0
train: {{steps: 150, batch_size: 4, clip: 1.0, evaluations: 1, pictures: 0, ema: null}}
optimizer: {{lr: 1e-3, weight_decay: 0.0}}
schedule: {{name: cosine, warmup: 0.05}}
output: {out}
"""


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images with both truths, without their smallest objects, as both splits."""
    if not COCO.is_dir():
        pytest.skip("needs ../shared/data/coco_open")
    root = tmp_path_factory.mktemp("coco")
    for folder in ("annotations", "annotations/panoptic_train", "images/train"):
        (root / folder).mkdir(parents=True)
    for kind in ("instances", "panoptic"):
        content = json.loads((COCO / f"annotations/{kind}_train.json").read_text())
        content["images"] = [image for image in content["images"] if image["id"] in IMAGES]
        truths = [truth for truth in content["annotations"] if truth["image_id"] in IMAGES]
        if kind == "instances":
            content["annotations"] = large(truths)
        else:
            content["annotations"] = [copy_segments(truth, root) for truth in truths]
        for image in content["images"]:
            shutil.copy(COCO / "images/train" / image["file_name"], root / "images/train")
        (root / f"annotations/{kind}_train.json").write_text(json.dumps(content))
    return root


def large(truths: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [truth for truth in truths if truth["area"] >= SMALLEST]


def copy_segments(truth: dict[str, Any], root: Path) -> dict[str, Any]:
    """Copy a map without its small segments; what it then holds."""
    truth["segments_info"] = large(truth["segments_info"])
    path = Path("annotations/panoptic_train") / truth["file_name"]
    colors = np.array(Image.open(COCO / path).convert("RGB"))
    numbers = colors.astype(np.int64) @ (1, 256, 65536)
    colors[~np.isin(numbers, [segment["id"] for segment in truth["segments_info"]])] = 0
    Image.fromarray(colors).save(root / path)
    return truth


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "task", "number", "least"),
    [
        (EOMT, "instance", "AP50", 0.8),
        (EOMT, "panoptic", "PQ", 0.75),
        (MASK2FORMER, "instance", "AP50", 0.8),
        (MASK2FORMER, "panoptic", "PQ", 0.75),
        (RTDETR, "instance", "AP50", 0.8),
    ],
    ids=["eomt", "eomt-panoptic", "mask2former", "mask2former-panoptic", "rtdetr"],
)  # fmt: skip
def test_photographs_are_learnt_by_heart(
    model: str, task: str, number: str, least: float, photographs: Path, tmp_path: Path
) -> None:
    dataset, options = ("coco", ", masks: true") if task == "instance" else ("coco_panoptic", "")
    text = TEXT.format(
        model=model.format(task=task), dataset=dataset, options=options, root=photographs,
        out=tmp_path / "run",
    )  # fmt: skip
    assert train(loads(text, "test"))[number] >= least
