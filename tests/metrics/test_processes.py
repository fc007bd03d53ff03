"""Two processes, each with its share of the images, give the numbers of one that has seen all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitdense.metrics import processes
from vitdense.metrics.base import Metric
from vitdense.metrics.coco import CocoMetric
from vitdense.metrics.lvis import LvisMetric
from vitdense.metrics.miou import MeanIoU
from vitdense.metrics.object_metric import ObjectMetric
from vitdense.metrics.panoptic import PanopticQuality
from vitdense.metrics.processes import ImageSums, share
from vitdense.metrics.voc import VocMetric
from vitdense.structures import Batch, Frame, Prediction, Target

IMAGES, SIZE = 7, (24, 36)
KINDS = ("bbox", "segm", "boundary", "voc", "lvis")
COUNTED = ("miou", "panoptic")
"""Metrics that add up counts of each image."""


def masks_of(generator: torch.Generator, count: int) -> torch.Tensor:
    masks = torch.zeros(count, *SIZE, dtype=torch.bool)
    for mask in masks:
        y, x, h, w = torch.randint(1, 12, (4,), generator=generator).tolist()
        mask[y : y + h, x : x + 2 * w] = True
    return masks


def objects_of(image: int) -> tuple[Target, Prediction]:
    """Truth and a prediction of half its objects and some others, drawn from the image's number."""
    generator = torch.Generator().manual_seed(image)
    truth = masks_of(generator, image)
    found = torch.cat([truth[::2].roll(1, 1), masks_of(generator, 4)])
    boxes = torch.zeros(len(truth) + len(found), 4)
    labels = torch.randint(2, (len(boxes),), generator=generator)
    labels[image : image + len(truth[::2])] = labels[:image:2]
    for index, mask in enumerate(torch.cat([truth, found])):
        y, x = mask.nonzero().T
        boxes[index] = torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1])
    scores = torch.randint(1, 4, (len(found),), generator=generator).sort(descending=True)[0] / 4
    return (
        Target(labels=labels[:image], boxes=boxes[:image], masks=truth),
        Prediction(scores, labels[image:], boxes[image:], found),
    )


def metric_of(kind: str, backend: str) -> ObjectMetric:
    """By the overlap that COCO's metric compares, or by the metric's own name."""
    if kind in ("voc", "lvis"):
        return {"voc": VocMetric, "lvis": LvisMetric}[kind](["a", "b"])
    return CocoMetric(["a", "b"], iou_type=kind, backend=backend)  # type: ignore[arg-type]


def numbers_of(images: list[int], kind: str, backend: str = "device") -> dict[str, float]:
    metric = metric_of(kind, backend)
    for image in images:
        target, prediction = objects_of(image)
        target.judged = target.partial = torch.tensor([image % 3 != 1, True])
        target.crowd = torch.arange(image) % 5 == 4
        batch = Batch(
            torch.zeros(1, 3, 1, 1), [target], [Frame(SIZE, SIZE, SIZE)], [image], [Path()]
        )
        metric.update([prediction], batch)
    return metric.compute()


def counted_numbers_of(images: list[int], kind: str) -> dict[str, float]:
    """From one map of labels per image, drawn from its number, in several batches."""
    metric: Metric = PanopticQuality(["a", "b", "c"], things=["a"])
    if kind == "miou":
        metric = MeanIoU(["a", "b", "c"], boundary=0.05, calibration=True)
    for image in images:
        generator = torch.Generator().manual_seed(image)
        truth = torch.randint(4, (4, 5), generator=generator)
        answer = torch.where(torch.rand(4, 5, generator=generator) < 0.2, 1, truth.clamp(max=2))
        target = Target(
            labels=torch.arange(4) % 3,
            masks=truth == torch.arange(4)[:, None, None],
            semantic=torch.where(truth == 3, 255, truth),
        )
        prediction = Prediction(
            labels=torch.arange(3),
            semantic=answer,
            panoptic=answer + 1,
            confidence=torch.rand(4, 5, generator=generator),
        )
        frame = Frame((4, 5), (4, 5), (4, 5))
        batch = Batch(torch.zeros(1, 3, 1, 1), [target], [frame], [image], [Path("x.png")])
        metric.update([prediction], batch)
    return metric.compute()


PROCESS = """
import importlib.util, json, sys, torch
spec = importlib.util.spec_from_file_location("shared", sys.argv[1])
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)
rank, meeting = int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2
)
images = [[6, 0, 2, 4], [1, 3, 5, 6, 0]][rank]
sent = []
gather = torch.distributed.all_gather_object
def spy(values, value):
    sent.append(value)
    gather(values, value)
torch.distributed.all_gather_object = spy
found = {}
for kind in shared.KINDS:
    found[kind] = shared.numbers_of(images, kind)
    assert set(sent[1]) == {
        "images", "labels", "ranks", "scores", "matched", "ignored", "positives"
    }
    sent.clear()
monkey = importlib.import_module("vitdense.metrics.processes")
monkey.WAITING = 2  # so that some are searched before the end
for kind in shared.COUNTED:
    found[kind] = shared.counted_numbers_of(images, kind)
    assert sent == [images]
    sent.clear()
found["program"] = shared.numbers_of(images, "segm", "pycocotools")
found["nothing here"] = shared.numbers_of([[], [1, 3]][rank], "segm")
found["no maps here"] = shared.counted_numbers_of([[1, 3], []][rank], "miou")
print(json.dumps(found))
torch.distributed.destroy_process_group()
"""


def test_two_processes_equal_one(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, __file__, str(rank), str(tmp_path / "meeting")],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [json.loads(worker.communicate(timeout=240)[0]) for worker in workers]
    everything = list(range(IMAGES))
    for output in outputs:
        for kind in KINDS:
            assert output[kind] == pytest.approx(numbers_of(everything, kind), nan_ok=True)
        for kind in COUNTED:
            expected = counted_numbers_of(everything, kind)
            assert output[kind] == pytest.approx(expected, abs=1e-12)
            assert 0.1 < min(expected["mIoU" if kind == "miou" else "PQ"], 0.9) < 0.9
        assert output["program"] == pytest.approx(output["segm"], nan_ok=True, abs=1e-12)
        assert output["nothing here"] == pytest.approx(numbers_of([1, 3], "segm"), nan_ok=True)
        maps = counted_numbers_of([1, 3], "miou")
        assert output["no maps here"] == pytest.approx(maps, abs=1e-12)
    assert 0.05 < outputs[0]["segm"]["AP"] < 0.95


@pytest.mark.parametrize("kind", COUNTED)
def test_an_image_counts_once_in_a_process(kind: str) -> None:
    assert counted_numbers_of([0, 1, 0, 2, 1], kind) == counted_numbers_of([0, 1, 2], kind)


def test_an_image_belongs_to_the_lowest_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [[10, 2], [2, 9, "b"], ["a", 10]]
    monkeypatch.setattr("vitdense.metrics.processes.gather", lambda ids: shares)
    placed = []
    for rank, ids in enumerate(shares):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        placed.append(share(ids))
    assert placed == [[2, 0], [-1, 1, 4], [3, -1]]


def test_counts_of_many_classes_do_not_wait_in_heaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of 1,000 classes take 8 MB each."""
    searched: list[int] = []
    keep = ImageSums._keep
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "sum_over_processes", lambda counts: counts)
    monkeypatch.setattr(processes, "MOST_CELLS", 20)
    monkeypatch.setattr(
        ImageSums, "_keep", lambda self: searched.append(len(self._waiting)) or keep(self)
    )
    tables = torch.arange(45).reshape(5, 3, 3) % 4
    sums = ImageSums(3, 3)
    for table in tables:
        sums.add(table[None])
    assert searched == [3]
    mine = torch.tensor([True, False, True, True, False])
    assert torch.equal(sums.of_all([0, -1, 2, 3, -1]), tables[mine].sum(0))
    assert searched == [3, 2]
