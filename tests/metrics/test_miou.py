"""The mIoU metric equals a plain confusion matrix, exactly and on every rule."""

from __future__ import annotations

import subprocess
import sys
from itertools import count as count_from
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from vitdense.data.base import DataError
from vitdense.metrics.miou import PENDING, MeanIoU
from vitdense.structures import IGNORE, Batch, Frame, Prediction, Target

DUBAI = Path(__file__).parents[3] / "shared/data/aerial_dubai"


NUMBERS = count_from(0)
"""No two images of a test are the same."""


def batch_of(truths: list[Tensor], names: list[str] | None = None) -> Batch:
    sizes = [(truth.shape[0], truth.shape[1]) for truth in truths]
    names = names or [f"{index}.jpg" for index in range(len(truths))]
    return Batch(
        images=torch.zeros(len(truths), 3, 8, 8, dtype=torch.uint8),
        targets=[Target(semantic=truth) for truth in truths],
        frames=[Frame(size, size, size) for size in sizes],
        image_ids=[next(NUMBERS) for _ in truths],
        paths=[Path(name) for name in names],
    )


def count(metric: MeanIoU, answers: list[Tensor], truths: list[Tensor]) -> None:
    metric.update([Prediction(semantic=answer) for answer in answers], batch_of(truths))


def names_of(classes: int) -> list[str]:
    return [f"class {index}" for index in range(classes)]


def reference(
    answers: list[np.ndarray], truths: list[np.ndarray], classes: int, absent: str
) -> dict[str, float]:
    """Loops over classes, no matrix."""
    answer = np.concatenate([a.reshape(-1) for a in answers])
    truth = np.concatenate([t.reshape(-1) for t in truths])
    answer, truth = answer[truth != IGNORE], truth[truth != IGNORE]
    iou, acc, dice, weighted = {}, {}, {}, 0.0
    for index, name in enumerate(names_of(classes)):
        a, t = answer == index, truth == index
        for values, whole in (
            (iou, (a | t).sum()),
            (acc, t.sum()),
            (dice, (a.sum() + t.sum()) / 2),
        ):
            if whole or absent == "zero":
                values[name] = float((a & t).sum() / (whole or 1))
        weighted += t.mean() * iou.get(name, 0.0)
    return {
        "aAcc": float((answer == truth).mean()),
        "mIoU": float(np.mean(list(iou.values()))),
        "mAcc": float(np.mean(list(acc.values()))),
        "fwIoU": float(weighted),
        "mDice": float(np.mean(list(dice.values()))),
        **{f"IoU/{name}": value for name, value in iou.items()},
        **{f"Acc/{name}": value for name, value in acc.items()},
        **{f"Dice/{name}": value for name, value in dice.items()},
    }


@pytest.mark.parametrize("absent", ["skip", "zero"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_equals_plain_counting_on_random_maps(absent: str, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(0)
    classes = 9
    sizes = [(20, 31), (7, 5), (40, 40), (1, 1)]
    # Class 7 is only predicted, class 8 is nowhere, ignored pixels are everywhere.
    truths = [generator.choice([*range(7), IGNORE], size) for size in sizes]
    answers = [generator.integers(8, size=size) for size in sizes]
    metric = MeanIoU(names_of(classes), absent=absent)
    count(metric, [torch.tensor(answers[0])], [torch.tensor(truths[0], dtype=dtype)])
    count(
        metric,
        [torch.tensor(answer) for answer in answers[1:]],
        [torch.tensor(truth, dtype=dtype) for truth in truths[1:]],
    )
    expected = reference(answers, truths, classes, absent)
    numbers = metric.compute()
    assert numbers == pytest.approx(expected, abs=1e-12)
    assert list(numbers) == list(expected)
    assert metric.compute() == numbers
    assert ("IoU/class 8" in numbers) == (absent == "zero")
    assert numbers["IoU/class 7"] == 0.0


@pytest.mark.skipif(not DUBAI.exists(), reason="the real data is not here")
def test_equals_plain_counting_on_real_truth() -> None:
    generator = np.random.default_rng(0)
    truths, answers = [], []
    for file in sorted((DUBAI / "annotations/validation").glob("*.png"))[:6]:
        labels = np.asarray(Image.open(file)).astype(np.uint8) - np.uint8(1)  # 0 -> 255
        answer = np.roll(labels, (3, -5), axis=(0, 1))
        noise = generator.random(labels.shape) < 0.1
        answer = np.where(
            noise | (answer == IGNORE), generator.integers(5, size=labels.shape), answer
        )
        truths.append(labels)
        answers.append(answer)
    metric = MeanIoU(names_of(5))
    for answer, truth in zip(answers, truths, strict=True):
        count(metric, [torch.from_numpy(answer)], [torch.from_numpy(truth)])
    numbers = metric.compute()
    assert numbers == pytest.approx(reference(answers, truths, 5, "skip"), abs=1e-12)
    assert 0.3 < numbers["mIoU"] < 0.95


@pytest.mark.parametrize(("absent", "expected"), [("skip", 1.0), ("zero", 0.1)])
def test_perfect_answer_with_15_of_150_classes(absent: str, expected: float) -> None:
    """ADE20K's own evaluation code documents 0.1000 for its three sample images."""
    truth = torch.arange(15).repeat(10, 4)
    metric = MeanIoU(names_of(150), absent=absent)
    count(metric, [truth], [truth])
    numbers = metric.compute()
    assert numbers["mIoU"] == pytest.approx(expected)
    assert numbers["mAcc"] == pytest.approx(expected)
    assert numbers["aAcc"] == 1.0
    assert len(numbers) == 5 + 3 * (15 if absent == "skip" else 150)


def test_counts_beyond_float32_stay_exact() -> None:
    metric = MeanIoU(names_of(2))
    right = torch.zeros(1, 1, dtype=torch.int64)
    count(metric, [right], [right])
    metric.matrix.total[0, 0] = 2**40
    for _ in range(3):
        count(metric, [right, right + 1], [right, right])
    assert metric.matrix.total.dtype == torch.int64
    assert metric.matrix.total[:2, :2].tolist() == [[2**40 + 3, 3], [0, 0]]
    assert metric.compute()["aAcc"] == (2**40 + 3) / (2**40 + 6)


def test_ignored_pixels_count_for_nothing() -> None:
    truth = torch.tensor([[0, 1, IGNORE, IGNORE]])
    metric = MeanIoU(names_of(2))
    count(metric, [torch.tensor([[0, 1, 1, 0]])], [truth])
    assert metric.compute()["mIoU"] == 1.0


def test_label_255_is_ignored_among_more_classes_too() -> None:
    truth = torch.tensor([[0, 299, IGNORE, IGNORE]])
    metric = MeanIoU(names_of(300))
    count(metric, [torch.tensor([[0, 299, 255, 3]])], [truth])
    numbers = metric.compute()
    assert numbers["mIoU"] == 1.0 and "IoU/class 255" not in numbers


def test_classes_of_one_name_each_count() -> None:
    metric = MeanIoU(["a", "a", "b"])
    count(metric, [torch.tensor([[0, 0, 2, 2]])], [torch.tensor([[0, 1, 2, 2]])])
    numbers = metric.compute()
    assert numbers["mIoU"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert numbers["mAcc"] == pytest.approx((1 + 0 + 1) / 3)


def test_nothing_counted_is_zero_and_reset_forgets() -> None:
    metric = MeanIoU(names_of(3))
    zeros = dict.fromkeys(("aAcc", "mIoU", "mAcc", "fwIoU", "mDice"), 0.0)
    assert metric.compute() == zeros
    truth = torch.zeros(4, 4, dtype=torch.int64)
    count(metric, [truth], [truth])
    metric.reset()
    count(metric, [truth + 1], [torch.full_like(truth, IGNORE)])
    assert metric.compute() == zeros


@pytest.mark.parametrize("label", [3, 254, -1])
def test_a_strange_label_names_its_image(label: int) -> None:
    good = torch.zeros(4, 4, dtype=torch.int64)
    bad = good.clone()
    bad[2, 3] = label
    metric = MeanIoU(names_of(3))
    batch = batch_of([good, bad, good], ["a.jpg", "deep/b.jpg", "c.jpg"])
    metric.update([Prediction(semantic=good)] * 3, batch)
    with pytest.raises(DataError, match=rf"deep/b\.jpg: its annotation has label {label}, classes"):
        metric.compute()


def test_a_strange_label_is_not_found_only_at_the_end() -> None:
    good = torch.zeros(2, 2, dtype=torch.int64)
    metric = MeanIoU(names_of(3))
    count(metric, [good], [good + 7])
    with pytest.raises(DataError, match=r"0\.jpg: its annotation has label 7"):
        for _ in range(PENDING - 1):
            count(metric, [good], [good])


def test_faulty_predictions_name_their_image() -> None:
    truth = torch.zeros(4, 6, dtype=torch.int64)
    metric = MeanIoU(names_of(3))
    with pytest.raises(ValueError, match=r"0\.jpg: the prediction is of size \[6, 4\], the truth"):
        count(metric, [truth.T], [truth])
    with pytest.raises(ValueError, match=r"0\.jpg: the miou metric needs a semantic prediction"):
        metric.update([Prediction()], batch_of([truth]))
    count(metric, [truth + 3], [truth])
    with pytest.raises(ValueError, match=r"0\.jpg: class 3 was predicted, classes are 0\.\.2"):
        metric.compute()


PROCESS = """
import sys
from pathlib import Path
import torch
from vitdense.metrics.miou import MeanIoU
from vitdense.structures import Batch, Frame, Prediction, Target

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
)
metric = MeanIoU(["a", "b"])
truth = torch.zeros(1, 4, dtype=torch.uint8)
frame = Frame((1, 4), (1, 4), (1, 4))
batch = Batch(truth[None, None], [Target(semantic=truth)], [frame], [rank], [Path("x.jpg")])
metric.update([Prediction(semantic=torch.tensor([[0, 0, 0, rank]]))], batch)
numbers = metric.compute()
assert metric.compute() == numbers
print(numbers["aAcc"], numbers["mIoU"])
torch.distributed.destroy_process_group()
"""


def test_processes_add_up(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(tmp_path)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert outputs == [f"{7 / 8} {7 / 16}\n"] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_update_does_not_wait_for_the_device() -> None:
    truth = torch.randint(3, (32, 48), device="cuda")
    metric = MeanIoU(names_of(3))
    count(metric, [truth], [truth])
    torch.cuda.set_sync_debug_mode("error")
    try:
        count(metric, [truth], [truth])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metric.matrix.total.device.type == "cuda"
    assert metric.compute()["mIoU"] == 1.0


def outline(mask: np.ndarray, width: int) -> np.ndarray:
    """The mask less its erosion, outside of the image being no part of it."""
    square = np.ones((3, 3), dtype=bool)
    return mask & ~ndimage.binary_erosion(mask, square, iterations=width)


def test_boundary_iou_equals_eroded_masks() -> None:
    torch.manual_seed(0)
    shapes = [(40, 61), (90, 33)]
    truths = [torch.randint(4, (h // 8 + 1, w // 8 + 1)) for h, w in shapes]
    truths = [
        truth.repeat_interleave(8, 0).repeat_interleave(8, 1)[:h, :w]
        for truth, (h, w) in zip(truths, shapes, strict=True)
    ]
    answers = [torch.where(torch.rand(t.shape) < 0.05, 1, t.roll(2, 1)) for t in truths]
    truths[0][:9, :20] = IGNORE
    metric = MeanIoU(names_of(5), boundary=0.02)
    count(metric, answers, truths)
    found = metric.compute()
    inter, union = np.zeros(5), np.zeros(5)
    for answer, truth in zip(answers, truths, strict=True):
        width = max(1, round(0.02 * np.hypot(*truth.shape)))
        counted = truth.numpy() != IGNORE
        for label in range(5):
            a, t = (outline(maps.numpy() == label, width) & counted for maps in (answer, truth))
            inter[label] += (a & t).sum()
            union[label] += (a | t).sum()
    for label in range(4):
        assert found[f"BIoU/class {label}"] == pytest.approx(inter[label] / union[label], abs=1e-12)
    assert "BIoU/class 4" not in found
    assert found["mBIoU"] == pytest.approx((inter[:4] / union[:4]).mean(), abs=1e-12)
    assert "mBIoU" not in MeanIoU(names_of(5)).compute()


def test_calibration_error_by_hand() -> None:
    torch.manual_seed(0)
    truth = torch.randint(3, (20, 30))
    answer = torch.where(torch.rand(20, 30) < 0.3, 0, truth)
    confidence = torch.rand(20, 30)
    confidence[0, :3] = torch.tensor([0.0, 1.0, 0.2])  # 0.2 is the upper edge of the third bin
    truth[10:] = IGNORE
    metric = MeanIoU(names_of(3), calibration=True)
    metric.update([Prediction(semantic=answer, confidence=confidence)], batch_of([truth]))
    right, sure = (answer == truth)[:10].flatten(), confidence[:10].flatten()
    error = 0.0
    for index in range(15):
        inside = (sure > index / 15) & (sure <= (index + 1) / 15)
        if index == 0:
            inside |= sure == 0
        if inside.any():
            gap = right[inside].double().mean() - sure[inside].double().mean()
            error += inside.double().mean().item() * abs(gap.item())
    assert metric.compute()["ECE"] == pytest.approx(error, abs=1e-9)
    with pytest.raises(ValueError, match=r"0\.jpg: calibration needs the confidence"):
        metric.update([Prediction(semantic=answer)], batch_of([truth]))
