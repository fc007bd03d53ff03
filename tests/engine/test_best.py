"""Which evaluation is the best, and for how long none was better."""

from __future__ import annotations

import math

import pytest

from vitdense.engine.best import Best, Headline, headline_of
from vitdense.metrics.base import Metric
from vitdense.metrics.coco import CocoMetric
from vitdense.metrics.image_labels import ImageLabels, Several
from vitdense.metrics.miou import MeanIoU
from vitdense.metrics.panoptic import PanopticQuality


def offered(values: list[float], headline: Headline) -> list[tuple[bool, int, int]]:
    """Whether each was taken, which step is the best then, and for how long it has been."""
    best, seen = Best(), []
    for step, value in enumerate(values):
        taken = best.offer(step, {headline.name: value}, headline)
        seen.append((taken, best.step, best.waited))
    return seen


def test_of_equals_the_latest_is_kept_and_none_is_better() -> None:
    assert offered([0.0, 0.0, 0.5, 0.4, 0.5, 0.6], Headline("AP")) == [
        (True, 0, 0),
        (True, 1, 1),
        (True, 2, 0),
        (False, 2, 1),
        (True, 4, 2),
        (True, 5, 0),
    ]


def test_lower_may_be_better_and_nan_is_the_worst() -> None:
    assert offered([math.nan, 0.5, 0.7, 0.4, math.nan], Headline("ECE", lower=True)) == [
        (True, 0, 0),
        (True, 1, 0),
        (False, 1, 1),
        (True, 3, 0),
        (False, 3, 1),
    ]


def test_the_metric_names_the_headline_and_its_direction() -> None:
    metric = MeanIoU(["a", "b"], calibration=True)
    assert headline_of(metric, None) == Headline("mIoU")
    assert headline_of(metric, "mAcc") == Headline("mAcc")
    assert headline_of(metric, "IoU/b") == Headline("IoU/b")
    both = Several([metric, ImageLabels(["x"])])
    assert headline_of(both, "ECE") == Headline("ECE", lower=True)
    assert headline_of(both, "image_mAP") == Headline("image_mAP")
    assert headline_of(both, "image_AP/x") == Headline("image_AP/x")


@pytest.mark.parametrize(
    ("metric", "wrong", "near"),
    [
        (MeanIoU(["a", "b"]), "mIOU", "mIoU"),
        (MeanIoU(["a", "b"]), "ECE", "aAcc, mIoU, mAcc, fwIoU, mDice"),
        (MeanIoU(["road", "sky"]), "IoU/raod", "Did you mean 'IoU/road'"),
        (CocoMetric(["a"]), "AP5", "AP50"),
        (PanopticQuality(["a", "b"], things=["a"]), "SP", "SQ"),
    ],
    ids=lambda value: str(value),
)
def test_an_unknown_number_is_refused_before_the_run(metric: Metric, wrong: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"^train.best: no number is called '{wrong}'.*{near}"):
        headline_of(metric, wrong)


class Late(Metric):
    """Computes nothing from nothing."""

    headline = "score"

    def reset(self) -> None:
        self.sum, self.count = 0.0, 0

    def compute(self) -> dict[str, float]:
        return {"score": self.sum / self.count}


def test_a_metric_that_cannot_tell_is_asked_at_the_first_evaluation() -> None:
    headline = headline_of(Late(["a"]), "scores")
    with pytest.raises(ValueError, match="'scores'.* Did you mean 'score'"):
        Best().offer(1, {"score": 0.5, "IoU/a": 0.5}, headline)


def test_another_number_may_decide_after_a_resumption() -> None:
    best = Best(step=1, numbers={"AP": 0.5, "AP50": 0.6})
    assert best.offer(2, {"AP": 0.4, "AP50": 0.7}, Headline("AP50"))
