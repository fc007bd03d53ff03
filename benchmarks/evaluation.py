"""Processor time of the metrics beside other programs, from predictions in memory to the numbers.

    python -m benchmarks.evaluation boxes --images 5000 --json boxes.json
    python -m benchmarks.evaluation masks --images 200
    python -m benchmarks.evaluation panoptic --images 100
    python -m benchmarks.evaluation semantic --images 100
    python -m benchmarks.evaluation growth --images 1000 5000 20000 50000
    python -m benchmarks.evaluation loop configs/demo/detection.yaml runs/mine/model.safetensors

One process with one thread; programs take turns, and the median of the rounds counts. Data are
generated like COCO's validation split (`benchmarks/coco_like.py`), and all programs must give the
same numbers. "all" is the sum, "ratio" how many times as fast as the last program. Of the others
"conversion" is the way from tensors to their index, for pycocotools a dictionary for each object;
"ratio_to_own" compares with the last program as if that cost nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import coco_like, evaluation_loop
from benchmarks import evaluation_programs as programs
from benchmarks.evaluation_programs import Seconds
from vitdense.metrics.miou import MeanIoU
from vitdense.metrics.panoptic import PanopticQuality, common_pixels
from vitdense.metrics.panoptic_files import PanopticImage, count_image, score_files
from vitdense.structures import Batch, Frame, Prediction, Target

Rows = dict[str, dict[str, float]]


def take_turns(runs: dict[str, Callable[[], tuple[Seconds, Any]]], rounds: int) -> Rows:
    """Median seconds of each, and how many times as fast as the last one; results must be equal."""
    times: dict[str, list[Seconds]] = {name: [] for name in runs}
    results = {}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds, results[name] = run()
            times[name].append(seconds)
    *_, reference = runs
    rows: Rows = {}
    for name, each in times.items():
        np.testing.assert_allclose(results[name], results[reference], atol=1e-9, err_msg=name)
        parts = {key: statistics.median(seconds[key] for seconds in each) for key in each[0]}
        rows[name] = {"all": statistics.median(sum(s.values()) for s in each), **parts}
    for name, row in rows.items():
        pairs = zip(times[name], times[reference], strict=True)
        ratios = [(_all(b) / _all(a), _without(b, "conversion") / _all(a)) for a, b in pairs]
        row["ratio"], row["ratio_to_own"] = map(statistics.median, zip(*ratios, strict=True))
    return rows


def _all(seconds: Seconds) -> float:
    return sum(seconds.values())


def _without(seconds: Seconds, part: str) -> float:
    return _all(seconds) - seconds.get(part, 0.0)


def timed(function: Callable[[], Any]) -> tuple[Seconds, Any]:
    """Processor seconds and result."""
    start = time.process_time()
    result = function()
    return {"own": time.process_time() - start}, result


def boxes(images: int, rounds: int, backends: list[str]) -> Rows:
    """The 12 numbers of boxes."""
    data = coco_like.objects(images)
    return take_turns({name: programs.boxes(data, name) for name in backends}, rounds)


def masks(images: int, rounds: int, backends: list[str]) -> Rows:
    """The 12 numbers of masks, each program with its own encoding; drawing them is not timed."""
    data = coco_like.objects(images)
    return take_turns({name: programs.masks(data, name) for name in backends}, rounds)


def growth(sizes: list[int], rounds: int) -> Rows:
    """Boxes by `device` on sets of growing size; memory is the peak so far, with the data in it.

    Sets of more than 5,000 images have the same ones again and again, under other ids.
    """
    rows: Rows = {}
    for images in sizes:
        data = coco_like.objects(min(images, 5000))
        run = programs.boxes((data * (images // len(data) + 1))[:images], "device")
        seconds = statistics.median(sum(run()[0].values()) for _ in range(rounds))
        rows[f"{images} images"] = {
            "all": seconds,
            "microseconds_per_image": 1e6 * seconds / images,
            "peak_mb": peak_mb(),
        }
    if len(sizes) > 1:
        logs = [[math.log(n) for n in sizes], [math.log(row["all"]) for row in rows.values()]]
        rows["fit"] = {"exponent": statistics.linear_regression(*logs).slope}
    return rows


def panoptic(images: int, rounds: int) -> Rows:
    """PQ from maps of numbers, from colors as PNG files decode to, and from the files."""
    data = coco_like.panoptic(images)
    rows: Rows = {}
    for name, runs in (("numbers", _from_numbers(data)), ("colors", _from_colors(data))):
        rows |= {f"{key}, from {name}": row for key, row in take_turns(runs, rounds).items()}
    with tempfile.TemporaryDirectory() as folder:
        truth, answer = programs.write_panoptic(data, Path(folder))
        runs = {
            "device": lambda: timed(lambda: score_files(truth, answer)["PQ"]),
            "hotcoco": lambda: timed(lambda: programs.panoptic_by_hotcoco(truth, answer)),
            "panopticapi": lambda: timed(lambda: programs.panoptic_from_files(truth, answer)),
        }
        rows |= {f"{key}, from files": row for key, row in take_turns(runs, rounds).items()}
    return rows


def _from_numbers(data: list[coco_like.Maps]) -> dict[str, Callable[[], tuple[Seconds, Any]]]:
    names = [str(label) for label in range(coco_like.CLASSES)]
    plain = [(t.numpy().astype(np.uint32), a.numpy().astype(np.uint32), *c) for t, a, *c in data]

    def ours() -> float:
        metric = PanopticQuality(names)
        for truth, answer, classes, labels in data:
            pixels = common_pixels(truth, answer, len(classes), len(labels))
            metric.count(pixels, labels, classes, torch.zeros(len(classes), dtype=torch.bool))
        return metric.compute()["PQ"]

    def theirs() -> float:
        maps = ((t, a, programs.infos(c, 1), programs.infos(p, 1)) for t, a, c, p in plain)
        return programs.panoptic_quality(maps)

    return {"device": lambda: timed(ours), "panopticapi": lambda: timed(theirs)}


def _from_colors(data: list[coco_like.Maps]) -> dict[str, Callable[[], tuple[Seconds, Any]]]:
    names = [str(label) for label in range(coco_like.CLASSES)]
    plain = [
        (coco_like.colors(t), coco_like.colors(a), programs.infos(c), programs.infos(p))
        for t, a, c, p in data
    ]
    labels = {label: label for label in range(coco_like.CLASSES)}

    def ours() -> float:
        metric = PanopticQuality(names)
        for truth, answer, there, found in plain:
            pair = (
                PanopticImage(Path("map.png"), Path("panoptic.json"), torch.from_numpy(some), its)
                for some, its in ((truth, there), (answer, found))
            )
            count_image(metric, *pair, labels)
        return metric.compute()["PQ"]

    def theirs() -> float:
        maps = ((programs.rgb2id(t), programs.rgb2id(a), *infos) for t, a, *infos in plain)
        return programs.panoptic_quality(maps)

    return {"device": lambda: timed(ours), "panopticapi": lambda: timed(theirs)}


def semantic(images: int, rounds: int) -> Rows:
    """The confusion matrix of label maps in memory, 150 classes."""
    data = coco_like.semantic(images)
    names = [str(label) for label in range(150)]

    def ours() -> float:
        metric = MeanIoU(names)
        for number, (truth, answer) in enumerate(data):
            frame = Frame(coco_like.SIZE, coco_like.SIZE, coco_like.SIZE)
            target, path = Target(semantic=truth), Path("map.png")
            batch = Batch(torch.zeros(1, 3, 1, 1), [target], [frame], [number], [path])
            metric.update([Prediction(semantic=answer)], batch)
        return metric.compute()["mIoU"]

    runs = {
        "device": lambda: timed(ours),
        "hotcoco": lambda: timed(lambda: programs.semantic_by_hotcoco(data, names)),
        "numpy": lambda: timed(lambda: programs.semantic_by_numpy(data, len(names))),
    }
    return take_turns(runs, rounds)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = ("boxes", "masks", "panoptic", "semantic", "growth", "loop")
    parser.add_argument("kind", choices=kinds)
    parser.add_argument(
        "sources", nargs="*", help="loop: configs or trained models that are profiled"
    )
    parser.add_argument("--images", type=int, nargs="+", default=[200])
    parser.add_argument("--rounds", type=int, default=3)
    everyone = ["device", "hotcoco", "faster-coco-eval", "pycocotools"]
    parser.add_argument("--backends", nargs="+", default=everyone, help="the last is compared to")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    first, rounds = options.images[0], options.rounds
    if options.kind == "loop":
        rows = evaluation_loop.shares(options.sources, first)
    elif options.kind == "growth":
        rows = growth(options.images, rounds)
    elif options.kind in ("boxes", "masks"):
        rows = {"boxes": boxes, "masks": masks}[options.kind](first, rounds, options.backends)
    else:
        rows = {"panoptic": panoptic, "semantic": semantic}[options.kind](first, rounds)
    width = max(map(len, rows))
    for name, row in rows.items():
        print(f"{name:<{width}}", *(f"{key} {value:.4g}" for key, value in row.items()), sep="  ")
    print(f"{options.images} images, peak memory of the process {peak_mb():.0f} MB")
    if options.json:
        options.json.write_text(
            json.dumps({"images": options.images, "peak_mb": peak_mb(), **rows})
        )


if __name__ == "__main__":
    main()
