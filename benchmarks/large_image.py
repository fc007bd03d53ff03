"""Memory and time of segmenting a large image: window by window, and at once.

    python -m benchmarks.large_image --size 4000 6000 --classes 150 --out large_image.json

The model is a tiny convolutional one whose receptive field fits the overlap of the windows, so that
with `--blend center` both ways must give the same labels; how many pixels differ is counted. Each
way runs in a process of its own. `peak_gib` is the most memory that the process had, with torch and
the image in it (on a GPU: the most that torch allocated there).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitdense.config.schema import Inference
from vitdense.data.collate import collate
from vitdense.engine.evaluate import answer, check_inference, place
from vitdense.engine.runtime import choose_device, memory_used
from vitdense.heads.segmentation.base import classify
from vitdense.models.base import Model
from vitdense.structures import Frame, Prediction, Sample, Target

DIVISOR = 32


class Tiny(Model):
    """Patches of `stride` pixels, two 3 x 3 convolutions, a classifier."""

    task = "semantic"

    def __init__(self, num_classes: int, stride: int, width: int = 16) -> None:
        super().__init__()
        self.num_classes, self.divisor = num_classes, DIVISOR
        self.patches = nn.Conv2d(3, width, stride, stride)
        self.blocks = nn.Sequential(*(nn.Conv2d(width, width, 3, padding=1) for _ in range(2)))
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor, targets: list[Target] | None = None) -> Tensor:
        maps = self.patches(images.float() / 255)
        for block in self.blocks:
            maps = maps + F.gelu(block(maps))
        return self.classifier(maps)

    def semantic_logits(self, outputs: Tensor) -> Tensor:
        return outputs

    def predict(self, outputs: Tensor, frames: list[Frame]) -> list[Prediction]:
        pairs = zip(outputs, frames, strict=True)
        return [Prediction(semantic=classify(logits, frame)) for logits, frame in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, nargs=2, default=[4000, 6000], help="height, width")
    parser.add_argument("--prepared", type=float, default=1.0, help="size the model sees, relative")
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--stride", type=int, default=4, help="of the model's scores")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--overlap", type=float, default=1 / 3)
    parser.add_argument("--blend", default="center", choices=["flat", "gaussian", "center"])
    parser.add_argument("--batch", type=int, default=1, help="windows at a time")
    parser.add_argument("--flip", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-whole", action="store_true", help="windows only")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    ways = ["windows"] if options.no_whole else ["windows", "whole"]
    facts = {
        name: value for name, value in vars(options).items() if name not in ("out", "no_whole")
    }
    report: dict[str, Any] = {"torch": torch.__version__, **facts}
    labels: list[Tensor] = []
    with tempfile.TemporaryDirectory() as folder:
        for way in ways:
            file = Path(folder) / f"{way}.pt"
            context = multiprocessing.get_context("spawn")
            process = context.Process(target=measure, args=(way, options, file))
            process.start()
            process.join()
            if process.exitcode:
                report[way] = f"failed with status {process.exitcode}"
                continue
            report[way], found = torch.load(file)
            labels.append(found)
    if len(labels) == 2:
        report["different_pixels"] = int((labels[0] != labels[1]).sum())
    print(json.dumps(report))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def measure(way: str, options: argparse.Namespace, file: Path) -> None:
    """Segment the image one way; writes the numbers and the labels."""
    torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    torch.manual_seed(0)
    model = Tiny(options.classes, options.stride).to(device).eval()
    height, width = options.size
    content = [round(side * options.prepared) for side in options.size]
    image = torch.randint(0, 256, (3, *content), dtype=torch.uint8)
    sample = Sample(image, Target(), 0, (height, width), Path("image"))
    (batch,) = collate([sample], divisor=DIVISOR, training=False)
    window = {
        "window": options.window, "overlap": options.overlap, "blend": options.blend,
        "batch_size": options.batch,
    }  # fmt: skip
    looks = window if way == "windows" else {}
    inference = Inference(flip=options.flip, **looks)
    check_inference(inference, model)
    # On a CPU, other processes do not count.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    before, start = memory_used(device), clock()
    batch = place(batch, device, inference)
    (prediction,) = answer(model, batch, torch.float32, inference)
    labels = prediction.to("cpu").semantic
    seconds = clock() - start
    numbers = {"seconds": seconds, "peak_gib": memory_used(device), "before_gib": before}
    torch.save((numbers, labels), file)


if __name__ == "__main__":
    main()
