"""What is said of a config that changed between two lives of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitdense.config import dump, loads
from vitdense.config.schema import SECTIONS, Config
from vitdense.engine.changes import EFFECTS, NOTHING, changes, table

TEXT = """
model: {backbone: vit_tiny_patch16_224, neck: fpn, head: {name: linear, dropout: 0.2}}
data: {dataset: coco, root: data, transforms: detection}
train: {steps: 10}
"""


def resolved(*overrides: str) -> str:
    return dump(loads(TEXT, "config.yaml", overrides))


def test_nothing_changed() -> None:
    assert changes(resolved(), resolved()) == []
    assert changes(resolved("output=runs/a"), resolved(f"output={Path('runs/a').resolve()}")) == []


@pytest.mark.parametrize(
    ("override", "line", "effect"),
    [
        ("optimizer.lr=1e-3", "optimizer.lr: 0.0002 -> 0.001", "applies from here on"),
        ("data.workers=3", "data.workers: auto -> 3", NOTHING),
        ("train.ema=true", "train.ema: null -> 0.999", "the average goes on"),
        ("train.batch_size=8", "train.batch_size: 16 -> 8", "another order of the images"),
        ("model.head.dropout=0", "model.head.dropout: 0.2 -> 0.0", "or it is refused"),
        ("model.head=upernet", "model.head.name: linear -> upernet", "or it is refused"),
        ("metric=coco", "metric: null -> coco", "not comparable"),
        ("schedule.name=constant", "schedule.name: cosine -> constant", "jumps to the new curve"),
        ("data.transforms.size=320", "data.transforms.size: 640 -> 320", "other images"),
        ("inference.scales=[1.0, 2.0]", "inference.scales: [1.0] -> [1.0, 2.0]", "not comparable"),
        ("seed=3", "seed: 0 -> 3", "other random numbers"),
    ],
)
def test_a_change_is_one_line(override: str, line: str, effect: str) -> None:
    (change,) = changes(resolved(), resolved(override))
    assert str(change) == line
    assert effect in change.effect
    assert table([change]).startswith(f"  {line}  ")


def test_a_key_that_is_new_or_gone() -> None:
    text = resolved().replace("seed: 0\n", "")
    assert [(it.key, it.old, it.new) for it in changes(text, resolved())] == [("seed", "-", "0")]
    assert [(it.key, it.old, it.new) for it in changes(resolved(), text)] == [("seed", "0", "-")]


def test_every_key_has_an_effect_and_every_effect_a_key() -> None:
    keys = set(Config.model_fields) | {
        f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields
    }
    assert set(Config.model_fields) - set(EFFECTS) == set()
    assert set(EFFECTS) - keys == {"processes", "images"}
