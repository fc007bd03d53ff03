"""Attention equals `nn.MultiheadAttention`; feed-forward parts keep their shapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitdense.layers.attention import Attention
from vitdense.layers.mlp import MLP, FeedForward


@pytest.fixture
def pair():
    torch.manual_seed(0)
    ours = Attention(24, 4).double()
    theirs = nn.MultiheadAttention(24, 4, batch_first=True).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    state = ours.state_dict()
    parts = ("query", "key", "value")
    theirs.load_state_dict(
        {
            "in_proj_weight": torch.cat([state[f"{part}.weight"] for part in parts]),
            "in_proj_bias": torch.cat([state[f"{part}.bias"] for part in parts]),
            "out_proj.weight": state["output.weight"],
            "out_proj.bias": state["output.bias"],
        }
    )
    return ours, theirs


def test_attention_equals_torch(pair):
    ours, theirs = pair
    queries, keys = torch.randn(2, 5, 24).double(), torch.randn(2, 9, 24).double()
    values = torch.randn(2, 9, 24).double()
    torch.testing.assert_close(ours(queries, keys, values), theirs(queries, keys, values)[0])


def test_attention_drops_only_in_training():
    torch.manual_seed(0)
    attention = Attention(16, 2, dropout=0.5)
    x = torch.randn(1, 6, 16)
    assert not torch.equal(attention(x, x, x), attention(x, x, x))
    attention.eval()
    assert torch.equal(attention(x, x, x), attention(x, x, x))


def test_attention_starts_like_torch():
    torch.manual_seed(0)
    ours, theirs = Attention(128, 4), nn.MultiheadAttention(128, 4)
    expected = theirs.in_proj_weight.abs().max()
    torch.testing.assert_close(ours.key.weight.abs().max(), expected, rtol=0.01, atol=0)


def test_attention_names_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="heads: 5 does not divide the width 24"):
        Attention(24, 5)


def test_mlp_is_linear_layers_with_relu_between():
    mlp = MLP(3, 8, 8, 2)
    a, b, c = mlp.layers
    x = torch.randn(4, 5, 3)
    torch.testing.assert_close(mlp(x), c(b(a(x).relu()).relu()))


def test_feed_forward_normalises_what_it_adds():
    part = FeedForward(16, 32, dropout=0.0)
    out = part(torch.randn(2, 7, 16) * 10)
    torch.testing.assert_close(out.mean(-1), torch.zeros(2, 7), atol=1e-5, rtol=0)
