"""Seconds of processor time for COCO's box or mask AP by each backend, and ratios to pycocotools.

    python -m benchmarks.metrics --images 500 --kind bbox --json out.json

Generated data like COCO's validation split (80 classes by a power law, 7.2 objects an image, 100
detections of which some lie near objects) is scored in one process with one thread, from tensors to
the curves; for other programs that takes a dictionary for each object. Backends take turns, and the
median counts. For `segm` the clock starts at bool masks, so it has the encoding in it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vitdense.metrics.backends import Backend, score
from vitdense.metrics.matching import Rules
from vitdense.metrics.objects import Objects
from vitdense.ops import run_length
from vitdense.ops.run_length import RunLengths

Times = dict[str, list[float]]
Encoded = tuple[Objects, dict[str, float]]

CLASSES, PER_IMAGE, FOUND = 80, 7.2, 100
SIZE = (480, 640)


def generate(images: int, seed: int = 0) -> tuple[Objects, Objects]:
    """Truth, and detections: 2 to 4 near each object, 1 in 5 of a wrong class, others far."""
    torch.manual_seed(seed)
    counts = torch.poisson(torch.full((images,), PER_IMAGE)).long()
    owner = torch.arange(images).repeat_interleave(counts)
    popularity = 1 / torch.arange(1, CLASSES + 1).float() ** 1.1
    labels = popularity.multinomial(len(owner), replacement=True)
    boxes = _boxes(len(owner))
    truth = _objects(owner, labels, boxes, torch.ones(len(owner)))
    truth.areas *= 0.6
    truth.crowd = torch.rand(len(owner)) < 0.01

    near = torch.arange(len(owner)).repeat_interleave(torch.randint(2, 5, (len(owner),)))
    far = FOUND * torch.ones(images).long() - torch.bincount(owner[near], minlength=images)
    far = torch.arange(images).repeat_interleave(far.clamp(min=0))
    moved = boxes[near] + torch.randn(len(near), 4) * 0.1 * boxes[near][:, 2:].repeat(1, 2)
    moved[:, 2:] = moved[:, 2:].clamp(min=1)
    guess = popularity.multinomial(len(near) + len(far), replacement=True)
    guess[: len(near)] = labels[near].where(torch.rand(len(near)) < 0.8, guess[: len(near)])
    scores = torch.rand(len(guess))
    scores[: len(near)] = scores[: len(near)] ** 0.5
    boxes = torch.cat([moved, _boxes(len(far))])
    return truth, _objects(torch.cat([owner[near], far]), guess, boxes, scores)


def _boxes(count: int) -> Tensor:
    sides = torch.exp(torch.randn(count, 2).double() * 0.9 + 4).clamp(4, 400)
    corner = torch.rand(count, 2).double() * (torch.tensor([640.0, 480.0]) - sides).clamp(min=0)
    return torch.cat([corner, sides], 1)


def _objects(images: Tensor, labels: Tensor, boxes: Tensor, scores: Tensor) -> Objects:
    order = images.argsort(stable=True)
    boxes = boxes[order]
    areas = boxes[:, 2] * boxes[:, 3]
    crowd = torch.zeros(len(order), dtype=torch.bool)
    rows = torch.arange(len(order))
    return Objects(images[order], labels[order], boxes, areas, scores[order].double(), crowd, rows)


def draw(boxes: Tensor) -> Tensor:
    """Bool masks [N, H, W] of ellipses in xywh boxes."""
    y = torch.arange(SIZE[0])[:, None] + 0.5
    x = torch.arange(SIZE[1])[None] + 0.5
    left, top, width, height = (value[:, None, None] for value in boxes.float().unbind(1))
    across = ((x - left) / width * 2 - 1) ** 2
    return across + ((y - top) / height * 2 - 1) ** 2 < 1


def encode_all(objects: Objects, encoders: dict[str, Callable[[Tensor], object]]) -> Encoded:
    """Run lengths of ellipses in the boxes, and each encoder's seconds; drawing is not timed."""
    parts, seconds = [], dict.fromkeys(encoders, 0.0)
    for boxes in objects.boxes.split(torch.bincount(objects.images).tolist()):
        masks = draw(boxes)
        for name, encoder in encoders.items():
            start = time.process_time()
            result = encoder(masks)
            seconds[name] += time.process_time() - start
            if isinstance(result, RunLengths):
                parts.append(result)
    masks = run_length.join(parts)
    return replace(objects, masks=masks, areas=masks.areas().double()), seconds


def encode_by_pycocotools(masks: Tensor) -> list[dict[str, object]]:
    from pycocotools import mask

    return [mask.encode(np.asfortranarray(one.numpy(), dtype=np.uint8)) for one in masks]


def measure(truth: Objects, found: Objects, backends: list[Backend], rounds: int) -> Times:
    """Processor seconds of each backend in each round, in turns; their results must be equal."""
    times: Times = {name: [] for name in backends}
    curves = {}
    for _ in range(rounds):
        for name in backends:
            start = time.process_time()
            curves[name] = score(truth, found, CLASSES, Rules(), name)
            times[name].append(time.process_time() - start)
    for name, found_curves in curves.items():
        torch.testing.assert_close(
            found_curves.precision, curves[backends[0]].precision, rtol=0, atol=1e-12, msg=name
        )
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--kind", choices=("bbox", "segm"), default="bbox")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backends", nargs="+", default=["device", "pycocotools"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    truth, found = generate(options.images)
    encoding: dict[str, float] = {}
    if options.kind == "segm":
        encoders = {"device": run_length.encode, "pycocotools": encode_by_pycocotools}
        crowd, areas = truth.crowd, truth.areas
        truth, encoding = encode_all(truth, encoders)
        truth = replace(truth, crowd=crowd, areas=areas)
        found, more = encode_all(found, encoders)
        encoding = {name: seconds + more[name] for name, seconds in encoding.items()}
    times = measure(truth, found, options.backends, options.rounds)
    rows = {}
    for name, seconds in times.items():
        first = encoding.get("device" if name == "device" else "pycocotools", 0.0)
        rows[name] = {"encoding": first, "scoring": statistics.median(seconds)}
        rows[name]["sum"] = sum(rows[name].values())
    for name, row in rows.items():
        text = "  ".join(f"{part} {seconds:.2f} s" for part, seconds in row.items())
        ratio = rows.get("pycocotools", row)["sum"] / row["sum"]
        print(f"{name:<17}{text}  {ratio:.1f} times as fast as pycocotools")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{options.images} images, {len(truth)} objects, {len(found)} detections, {peak:.0f} MB")
    if options.json:
        options.json.write_text(json.dumps({"images": options.images, "peak_mb": peak, **rows}))


if __name__ == "__main__":
    main()
