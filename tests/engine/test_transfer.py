"""Starting from an earlier model: rows of classes by name, all else exactly."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vitdense.backbones.timm import TimmBackbone
from vitdense.engine import checkpoint
from vitdense.engine.checkpoint import CheckpointError, Meta
from vitdense.engine.classes import class_axes
from vitdense.engine.transfer import match, transfer
from vitdense.models.pyramid import PyramidModel
from vitdense.registry import HEADS

OLD = ["cat", "dog", "Traffic light"]
NEW = ["horse", "dog", "traffic light", "bird", "CAT"]
KEPT = [(1, 1), (2, 2), (4, 0)]
FRESH = [0, 3]

QUERIES = dict(width=16, heads=2, ffn=16, decoder_layers=2, queries=5)
HEAD_OPTIONS = {
    "detr": dict(QUERIES, encoder_layers=1),
    "deformable_detr": dict(
        QUERIES, encoder_layers=1, points=2, num_levels=2, class_aware_proposals=True
    ),
    "rtdetr": dict(QUERIES, encoder_width=16, encoder_ffn=16, points=2),
    "dino": dict(QUERIES, encoder_layers=1, points=2, num_levels=2),
    "lwdetr": dict(QUERIES, cross_heads=2, groups=3),
    "upernet": dict(channels=8, aux_channels=4),
    "linear": {},
}


def builder(head: str, **changes: Any) -> Callable[[int], PyramidModel]:
    backbone = partial(
        TimmBackbone, model="test_resnet", out_indices=[2, 3, 4], **changes.pop("backbone", {})
    )
    options = HEAD_OPTIONS[head] | changes
    return lambda count: PyramidModel(
        count, backbone=backbone, head=partial(HEADS.get(head), **options)
    )


def save(path: Path, model: nn.Module, classes: list[str]) -> Path:
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    meta = Meta("{}", classes, list(range(len(classes))), "detection", 3, {}, "0")
    checkpoint.save_model(path, model, meta)
    return path


@pytest.mark.parametrize("head", HEAD_OPTIONS)
def test_rows_go_to_their_names(head: str, tmp_path: Path) -> None:
    build = builder(head)
    old, new = build(len(OLD)), build(len(NEW))
    path = save(tmp_path / "model.safetensors", old, OLD)
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    done = transfer(path, new, build, NEW, new_head=False)
    assert done.matches == KEPT
    assert done.new == ["horse", "bird"]
    found, given = new.state_dict(), old.state_dict()
    axes = class_axes(new, build)
    assert axes and done.axes == sorted(axes)
    assert any("classifier" in name or "classes" in name for name in axes)
    for name, tensor in found.items():
        if name not in axes:
            torch.testing.assert_close(tensor, given[name])
            continue
        axis, extra = axes[name].axis, axes[name].extra
        rows = tensor.movedim(axis, 0)
        theirs, initial = given[name].movedim(axis, 0), before[name].movedim(axis, 0)
        for ours, old_row in KEPT:
            torch.testing.assert_close(rows[ours], theirs[old_row])
        for row in FRESH:
            torch.testing.assert_close(rows[row], initial[row])
        if extra:  # "no object"
            torch.testing.assert_close(rows[len(NEW) :], theirs[len(OLD) :])


def test_every_classwise_part_is_found() -> None:
    def found(head: str) -> set[str]:
        build = builder(head)
        return {name.removesuffix(".weight") for name in class_axes(build(3), build)}

    assert found("detr") == {"head.classes", "head.classes.bias"}
    deformable = found("deformable_detr")
    assert {f"head.decoder.predictors.{i}.classes" for i in range(2)} <= deformable
    assert "head.first_stage.predictor.classes" in deformable
    rtdetr = found("rtdetr")
    assert "head.denoising.classes" in rtdetr
    assert len([name for name in found("upernet") if not name.endswith("bias")]) == 2


def test_says_what_it_kept(tmp_path: Path) -> None:
    build = builder("detr")
    path = save(tmp_path / "model.safetensors", build(len(OLD) + 1), [*OLD, "zebra"])
    text = str(transfer(path, build(len(NEW)), build, NEW, new_head=False))
    assert "kept 3 of 5 classes by name (case apart): dog, traffic light, CAT" in text
    assert "new: horse, bird" in text
    assert "left out: zebra" in text
    assert "new rows in: head.classes.bias, head.classes.weight" in text


def test_the_same_classes_are_taken_as_they_are(tmp_path: Path) -> None:
    build = builder("linear")
    old, new = build(3), build(3)
    path = save(tmp_path / "model.safetensors", old, OLD)
    done = transfer(path, new, build, OLD, new_head=False)
    assert done.new == [] and "new: none" in str(done)
    for name, tensor in new.state_dict().items():
        torch.testing.assert_close(tensor, old.state_dict()[name])


def test_another_order_of_the_same_classes_moves_rows(tmp_path: Path) -> None:
    build = builder("linear")
    old, new = build(3), build(3)
    path = save(tmp_path / "model.safetensors", old, OLD)
    transfer(path, new, build, OLD[::-1], new_head=False)
    (name, *_) = class_axes(new, build)
    torch.testing.assert_close(new.state_dict()[name], old.state_dict()[name].flip(0))


def test_what_does_not_match_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "model.safetensors", builder("detr")(3), OLD)
    build = builder("detr", queries=7)
    with pytest.raises(CheckpointError, match=r"head\.queries\.weight is \[5, 16\] in the file"):
        transfer(path, build(5), build, NEW, new_head=False)


def test_another_head_is_refused_unless_told(tmp_path: Path) -> None:
    old = builder("detr")(3)
    path = save(tmp_path / "model.safetensors", old, OLD)
    build = builder("linear")
    new = build(5)
    with pytest.raises(CheckpointError, match=r"head\..* train\.new_head=true"):
        transfer(path, new, build, NEW, new_head=False)
    head = {name: tensor.clone() for name, tensor in new.head.state_dict().items()}
    done = transfer(path, new, build, NEW, new_head=True)
    assert "all but the head" in str(done)
    for name, tensor in new.head.state_dict().items():
        torch.testing.assert_close(tensor, head[name])
    for name, tensor in new.backbone.state_dict().items():
        torch.testing.assert_close(tensor, old.backbone.state_dict()[name])


def test_the_rest_must_match_with_a_new_head_too(tmp_path: Path) -> None:
    path = save(tmp_path / "model.safetensors", builder("detr")(3), OLD)
    build = builder("linear", backbone={"in_chans": 1})
    with pytest.raises(CheckpointError, match=r"backbone\.model\.conv1"):
        transfer(path, build(5), build, NEW, new_head=True)


def test_names_match_exactly_before_they_match_but_for_case() -> None:
    assert match(["cat", "CAT"], ["CAT", "cat"]) == [(0, 1), (1, 0)]
    assert match(["Dog"], ["dog"]) == [(0, 0)]
    assert match(["Dog"], ["dog", "DOG"]) == []  # which of the two?
    assert match(["bird"], ["dog"]) == []
    assert match(["building, edifice"], ["wall", "building"]) == [(0, 1)]  # ADE20K's synonyms


class TwoAxes(nn.Module):
    """A confusion matrix: two axes of classes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.matrix = nn.Parameter(torch.zeros(num_classes, num_classes))


class Reads(nn.Module):
    """A constructor that reads a value, which the meta device cannot."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.rows = nn.Parameter(torch.zeros(4, num_classes + int(torch.ones(1).item())))


def test_a_parameter_without_rows_of_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"classes: matrix is \[3, 3\] for 3 classes"):
        class_axes(TwoAxes(3), TwoAxes)  # type: ignore[arg-type]


def test_a_model_that_cannot_be_built_for_one_class_more_is_refused() -> None:
    def build(count: int) -> nn.Module:
        if count > 3:
            raise ValueError("priors: has 3 numbers")
        return Reads(count)

    with pytest.raises(ValueError, match="classes: .* one class more, which failed: priors"):
        class_axes(build(3), build)  # type: ignore[arg-type]


def test_constructors_that_read_values_are_built_on_the_cpu() -> None:
    axes = class_axes(Reads(3), Reads)  # type: ignore[arg-type]
    assert (axes["rows"].axis, axes["rows"].extra) == (1, 1)


def test_random_numbers_go_on_as_if_nothing_was_built() -> None:
    build = builder("linear")
    model = build(3)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    class_axes(model, build)
    torch.testing.assert_close(torch.rand(3), expected)
