"""Every way to masks learns four real photographs by heart, from their files to the metric."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vitdense.config import loads
from vitdense.engine.train import train

COCO = Path(__file__).parents[3] / "shared/data/coco_open"
IMAGES = 4

EOMT = """{{name: eomt, task: {task}, queries: 60, blocks: 2, mask_points: 2048, score_threshold: 0.5,
  backbone: {{name: timm, model: vit_tiny_patch16_224, patch_size: 8, img_size: 192,
              options: {{depth: 6}}}}}}"""
MASK2FORMER = """{{backbone: pvt_v2_b0, head: {{name: mask2former, task: {task}, width: 96, heads: 4,
  encoder_layers: 1, encoder_ffn: 256, decoder_layers: 3, ffn: 256, queries: 60, mask_points: 2048,
  score_threshold: 0.5}}}}"""
RTDETR = """{{backbone: pvt_v2_b0, head: {{name: rtdetr, masks: true, width: 96, heads: 4,
  encoder_ffn: 256, blocks: 1, queries: 60, decoder_layers: 3, ffn: 256, mask_points: 1024,
  nms: 0.7}}}}"""

TEXT = """
model: {model}
data:
  dataset: {{name: {dataset}{options}}}
  root: {root}
  transforms: {{name: detection, size: 192, iou_crop: 0.0, zoom_out: 0.0, photometric: 0.0, flip: 0.0}}
  workers: 0
train: {{steps: {steps}, batch_size: 4, clip: 1.0, evaluations: 1, pictures: 0, ema: null}}
optimizer: {{lr: 1e-3, weight_decay: 0.0}}
schedule: {{name: cosine, warmup: 0.05}}
output: {out}
"""


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first images that have both truths, as training and validation split."""
    if not COCO.is_dir():
        pytest.skip("needs ../shared/data/coco_open")
    root = tmp_path_factory.mktemp("coco")
    (root / "images").mkdir()
    (root / "annotations").mkdir()
    kinds = ("instances", "panoptic")
    files = {
        kind: json.loads((COCO / f"annotations/{kind}_train.json").read_text()) for kind in kinds
    }
    things = {image["id"] for image in files["panoptic"]["images"]}
    objects = {each["image_id"] for each in files["instances"]["annotations"]}
    chosen = set(sorted(things & objects)[:IMAGES])
    for kind, content in files.items():
        content["images"] = [image for image in content["images"] if image["id"] in chosen]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in chosen]
        for split in ("train", "val"):
            (root / f"annotations/{kind}_{split}.json").write_text(json.dumps(content))
    for split in ("train", "val"):
        (root / f"images/{split}").symlink_to(COCO / "images/train")
        (root / f"annotations/panoptic_{split}").symlink_to(COCO / "annotations/panoptic_train")
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "task", "steps", "number", "least"),
    [
        (EOMT, "instance", 300, "AP50", 0.8),
        (EOMT, "panoptic", 300, "PQ", 0.6),
        (MASK2FORMER, "instance", 300, "AP50", 0.8),
        (MASK2FORMER, "panoptic", 300, "PQ", 0.6),
        (RTDETR, "instance", 300, "AP50", 0.8),
    ],
    ids=["eomt-instance", "eomt-panoptic", "mask2former-instance", "mask2former-panoptic", "rtdetr"],
)  # fmt: skip
def test_photographs_are_learnt_by_heart(
    model: str, task: str, steps: int, number: str, least: float, photographs: Path, tmp_path: Path
) -> None:
    dataset, options = ("coco", ", masks: true") if task == "instance" else ("coco_panoptic", "")
    text = TEXT.format(
        model=model.format(task=task), dataset=dataset, options=options, root=photographs,
        steps=steps, out=tmp_path / "run",
    )  # fmt: skip
    assert train(loads(text, "test"))[number] >= least
