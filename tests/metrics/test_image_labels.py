"""Accuracy and average precision of image labels, held to their definitions."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitdense.metrics.image_labels import ImageLabels, Several, average_precision
from vitdense.metrics.miou import MeanIoU
from vitdense.structures import Batch, Frame, Prediction, Target

LABELS = ["a", "b", "c"]


def batch_of(images: list[int], truths: list[Target]) -> Batch:
    count = len(images)
    frames, paths = [Frame((2, 2), (2, 2), (2, 2))] * count, [Path(f"{i}.jpg") for i in images]
    return Batch(torch.zeros(count, 3, 1, 1), truths, frames, list(images), paths)


def numbers_of(images: list[int]) -> dict[str, float]:
    """Over images whose truth and answer are drawn from their number; scores are often equal."""
    metric = ImageLabels(LABELS)
    for image in images:
        generator = torch.Generator().manual_seed(image)
        truth = torch.rand(3, generator=generator) < torch.tensor([0.6, 0.3, 0.0])
        scores = torch.randint(6, (3,), generator=generator) / 5
        metric.update(
            [Prediction(image_scores=scores)], batch_of([image], [Target(image_labels=truth)])
        )
    return metric.compute()


def by_definition(scores: list[float], truth: list[bool]) -> float:
    """The sum over thresholds of precision times the step in recall, image by image."""
    total, last = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        chosen = [known for score, known in zip(scores, truth, strict=True) if score >= threshold]
        recall = sum(chosen) / sum(truth)
        total += (recall - last) * sum(chosen) / len(chosen)
        last = recall
    return total


@pytest.mark.parametrize("seed", range(20))
def test_average_precision_is_its_definition(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = 1 + seed
    scores = torch.randint(1 + seed, (count,), generator=generator).double() / 20
    truth = torch.rand(count, generator=generator) < 0.4
    truth[seed // 2] = True
    ours = average_precision(scores, truth)
    assert ours == pytest.approx(by_definition(scores.tolist(), truth.tolist()), abs=1e-12)
    if importlib.util.find_spec("sklearn"):
        from sklearn.metrics import average_precision_score

        assert ours == pytest.approx(average_precision_score(truth, scores), abs=1e-12)


def test_numbers_by_hand() -> None:
    metric = ImageLabels(LABELS)
    rows = [
        ([0.9, 0.1, 0.2], [1, 0, 0]),  # right
        ([0.2, 0.8, 0.3], [1, 1, 0]),  # one of two labels is right
        ([0.7, 0.6, 0.1], [0, 1, 0]),  # wrong
        ([0.6, 0.1, 0.1], [0, 0, 0]),  # no label: no part of the accuracy
    ]
    answers = [Prediction(image_scores=torch.tensor(scores)) for scores, _ in rows]
    truths = [Target(image_labels=torch.tensor(known).bool()) for _, known in rows]
    metric.update(answers, batch_of([0, 1, 2, 3], truths))
    numbers = metric.compute()
    a, b = (1 + 2 / 4) / 2, 1.0
    assert numbers == pytest.approx(
        {"image_acc": 2 / 3, "image_mAP": (a + b) / 2, "image_AP/a": a, "image_AP/b": b}
    )
    metric.update(answers[:1], batch_of([0], truths[1:2]))  # seen before
    assert metric.compute() == numbers
    metric.reset()
    assert metric.compute() == {"image_acc": 0.0, "image_mAP": 0.0}


def test_a_missing_truth_names_the_image() -> None:
    answer = Prediction(image_scores=torch.zeros(3))
    with pytest.raises(ValueError, match=r"^7.jpg: has no image labels"):
        ImageLabels(LABELS).update([answer], batch_of([7], [Target()]))


def test_beside_the_metric_of_the_task() -> None:
    metric = Several([MeanIoU(["x", "y"]), ImageLabels(LABELS)])
    map_ = torch.zeros(2, 2, dtype=torch.long)
    truth = Target(semantic=map_, image_labels=torch.tensor([True, False, False]))
    for _ in range(2):
        metric.reset()
        answer = Prediction(semantic=map_, image_scores=torch.tensor([0.9, 0.1, 0.1]))
        metric.update([answer], batch_of([0], [truth]))
        numbers = metric.compute()
        assert numbers["mIoU"] == numbers["image_acc"] == numbers["image_AP/a"] == 1
    assert metric.headline == "mIoU" and str(metric) == "MeanIoU and ImageLabels"
    assert not metric.confidence
    assert Several([MeanIoU(["x"], calibration=True), ImageLabels(LABELS)]).confidence


PROCESS = """
import importlib.util, json, sys, torch
spec = importlib.util.spec_from_file_location("shared", sys.argv[1])
shared = importlib.util.module_from_spec(spec)
spec.loader.exec_module(shared)
rank, meeting = int(sys.argv[2]), sys.argv[3]
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2
)
shares = [[[6, 0, 2, 4], [1, 3, 5, 6, 0]], [[], [3, 1]]]
print(json.dumps([shared.numbers_of(share[rank]) for share in shares]))
torch.distributed.destroy_process_group()
"""


def test_two_processes_equal_one(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, __file__, str(rank), str(tmp_path / "meeting")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    found = [json.loads(worker.communicate(timeout=120)[0]) for worker in workers]
    expected = [pytest.approx(numbers_of([*range(7)])), pytest.approx(numbers_of([1, 3]))]
    assert found == [expected, expected]
