"""Segmenter's mask transformer against its description, arXiv 2105.05633, section 3.2."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitdense.heads.segmentation.segmenter import SegmenterHead
from vitdense.structures import Level, Target

PLAIN = [Level(128, 16)] * 2


def attention(x: Tensor, state: dict[str, Tensor], block: str, heads: int) -> Tensor:
    """Multi-head self-attention in words of matrices."""
    joint = x @ state[f"{block}.attn.qkv.weight"].T + state[f"{block}.attn.qkv.bias"]
    batch, count, width = x.shape
    q, k, v = joint.view(batch, count, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / math.sqrt(width // heads)).softmax(-1)
    mixed = (weights @ v).transpose(1, 2).reshape(batch, count, width)
    return mixed @ state[f"{block}.attn.proj.weight"].T + state[f"{block}.attn.proj.bias"]


def described(state: dict[str, Tensor], map_: Tensor, classes: int, heads: int) -> Tensor:
    def norm(x: Tensor, name: str) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.layer_norm(x, weight.shape, weight, state[f"{name}.bias"], eps=1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    batch, _, height, width = map_.shape
    patches = linear(map_.permute(0, 2, 3, 1).reshape(batch, height * width, -1), "embed")
    tokens = torch.cat([patches, state["classes"].repeat(batch, 1, 1)], dim=1)
    for index in range(2):
        block = f"blocks.{index}"
        tokens = tokens + attention(norm(tokens, f"{block}.norm1"), state, block, heads)
        hidden = F.gelu(linear(norm(tokens, f"{block}.norm2"), f"{block}.mlp.fc1"))
        tokens = tokens + linear(hidden, f"{block}.mlp.fc2")
    tokens = norm(tokens, "norm")
    patches = tokens[:, :-classes] @ state["patch_projection"]
    embeddings = tokens[:, -classes:] @ state["class_projection"]
    patches = patches / patches.norm(dim=-1, keepdim=True)
    embeddings = embeddings / embeddings.norm(dim=-1, keepdim=True)
    masks = norm(patches @ embeddings.transpose(1, 2), "mask_norm")
    return masks.permute(0, 2, 1).reshape(batch, classes, height, width)


def shaken(**options: object) -> SegmenterHead:
    torch.manual_seed(0)
    head = SegmenterHead(PLAIN, 5, **options).double().eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return head


@pytest.mark.parametrize(("options", "heads"), [({}, 2), ({"width": 48, "heads": 3}, 3)])
def test_equals_its_description(options: dict[str, int], heads: int) -> None:
    head = shaken(**options)
    maps = [torch.randn(2, 128, 4, 6, dtype=torch.float64) for _ in PLAIN]
    expected = described(head.state_dict(), maps[-1], 5, heads)
    assert expected.std() > 0.1
    torch.testing.assert_close(head(maps).logits, expected, atol=1e-10, rtol=0)


def test_only_the_last_level_is_read() -> None:
    head = shaken()
    first, last = (torch.randn(1, 128, 3, 3, dtype=torch.float64) for _ in PLAIN)
    assert torch.equal(head([first, last]).logits, head([first * 0, last]).logits)


def test_published_sizes_and_initial_values() -> None:
    head = SegmenterHead([Level(384, 16)], 150)
    assert len(head.blocks) == 2
    block = head.blocks[0]
    assert block.attn.num_heads == 6 and block.mlp.fc1.out_features == 4 * 384
    assert block.attn.attn_drop.p == block.attn.proj_drop.p == block.mlp.drop1.p == 0.1
    assert head.classes.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert head.patch_projection.std().item() == pytest.approx(384**-0.5, rel=0.02)


def test_semantic_logits_are_what_answers_are_made_of() -> None:
    head = shaken()
    outputs = head([torch.randn(2, 128, 4, 6, dtype=torch.float64)] * 2)
    assert head.semantic_logits(outputs) is outputs.logits


def test_learns_a_map_of_two_halves() -> None:
    torch.manual_seed(0)
    head = SegmenterHead([Level(32, 8)], 3, heads=2, dropout=0.0)
    truth = torch.zeros(32, 32, dtype=torch.uint8)
    truth[:, 16:] = 2
    maps, targets = [torch.randn(1, 32, 4, 4)], [Target(semantic=truth)]
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = sum(head.loss(head(maps), targets).values())
        loss.backward()
        optimizer.step()
    classes = head(maps).logits.argmax(1)[0]
    assert (classes[:, :2] == 0).all() and (classes[:, 2:] == 2).all()


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="^heads: 5 does not divide the width 128"):
        SegmenterHead(PLAIN, 3, heads=5)
