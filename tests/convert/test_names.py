"""Renaming by rules, with a record of where each tensor went."""

from __future__ import annotations

import pytest
import torch

from vitdense.convert.names import Weights, rename


def numbered(*names: str, rows: int = 1) -> dict[str, torch.Tensor]:
    return {name: torch.full((rows, 2), float(i)) for i, name in enumerate(names)}


def test_rules_apply_one_after_the_other_to_what_lies_within() -> None:
    weights = Weights(numbered("model.a.0.w", "other.w"))
    weights.rename([(r"a\.(\d)", r"b.\1"), (r"b\.", "c.")], within="model.", into="head.")
    assert set(weights.found) == {"head.c.0.w"} and set(weights.left) == {"other.w"}
    assert weights.origin["head.c.0.w"] == ["model.a.0.w"]


def test_replacements_may_count() -> None:
    found = rename(numbered("stages.0.w"), [(r"stages\.(\d)", lambda m: f"layer{int(m[1]) + 1}")])
    assert set(found) == {"layer1.w"}


def test_numbered_parts_are_joined_in_order_however_they_come() -> None:
    tensors = numbered("v.weight", "k.weight", "q.weight")
    rules = [(f"^{part}", f"qkv[{i}]") for i, part in enumerate("qkv")]
    weights = Weights(tensors)
    weights.rename(rules)
    torch.testing.assert_close(weights.found["qkv.weight"][:, 0], torch.tensor([2.0, 1.0, 0.0]))
    assert weights.origin["qkv.weight"] == ["q.weight", "k.weight", "v.weight"]


def test_listed_parts_are_split_in_equal_rows() -> None:
    found = rename({"in_proj_weight": torch.arange(6.0)}, [("in_proj_", "{query,key,value}.")])
    assert {name: x.tolist() for name, x in found.items()} == {
        "query.weight": [0, 1], "key.weight": [2, 3], "value.weight": [4, 5],
    }  # fmt: skip


def test_equal_tensors_may_share_a_name_and_others_not() -> None:
    same = {"a.w": torch.ones(2), "b.w": torch.ones(2)}
    weights = Weights(same)
    weights.rename([("^[ab]", "c")])
    assert weights.origin["c.w"] == ["a.w", "b.w"]
    with pytest.raises(ValueError, match=r"b\.w and a\.w both are c\.w, but they differ"):
        Weights(same | {"b.w": torch.zeros(2)}).rename([("^[ab]", "c")])


def test_drop_change_and_copy() -> None:
    weights = Weights(numbered("a.0.w", "a.anchors"))
    weights.drop(r"anchors$", "is computed")
    weights.rename([])
    weights.change(r"w$", lambda tensor: tensor + 5)
    weights.copy("a.0.w", "a.1.w")
    assert weights.dropped == {"a.anchors": "is computed"} and not weights.left
    assert weights.found["a.1.w"][0, 0] == 5 and weights.origin["a.1.w"] == ["a.0.w"]
