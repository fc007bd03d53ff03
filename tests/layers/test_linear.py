"""Linear layers and 1x1 convolutions that oneDNN computes are what they are by definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vitdense.layers.conv import Conv
from vitdense.layers.linear import MIN_FEATURES, MIN_MULTIPLICATIONS, Linear

SIDE = 256
ROWS = MIN_MULTIPLICATIONS // SIDE**2  # from so many on, oneDNN is worth its start


class Names(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def convolves(layer, x) -> bool:
    with Names() as names:
        layer(x)
    return any("convolution" in name for name in names.found)


def with_gradients(function, *inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    result = function(*inputs)
    result.square().sum().backward()
    return result, *(x.grad for x in inputs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(ROWS, SIDE), (2, ROWS, SIDE), (2, 2, ROWS // 2, SIDE)])
def test_equals_the_matrix_product(shape, bias):
    torch.manual_seed(0)
    layer, x = Linear(SIDE, SIDE, bias=bias), torch.randn(shape)
    assert convolves(layer, x) == torch.backends.mkldnn.is_available()
    parameters = list(layer.parameters())

    def ours(x, *parameters):
        named = dict(zip(("weight", "bias"), parameters, strict=False))
        return torch.func.functional_call(layer, named, x)

    found = with_gradients(ours, x, *parameters)
    expected = with_gradients(F.linear, x.double(), *(p.double() for p in parameters))
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_rows_that_do_not_lie_together():
    layer, x = Linear(SIDE, SIDE), torch.randn(2, SIDE, ROWS).transpose(1, 2)
    expected = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_what_is_no_number_stays_so():
    layer, x = Linear(SIDE, SIDE), torch.randn(ROWS, SIDE)
    x[3, 5] = torch.nan
    assert layer(x).isnan().any(1).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize(
    "layer, x",
    [
        (Linear(SIDE, SIDE), torch.randn(ROWS // 2, SIDE)),
        (
            Linear(MIN_FEATURES // 2, SIDE),
            torch.randn(4 * ROWS * SIDE // MIN_FEATURES, MIN_FEATURES // 2),
        ),
        (Linear(SIDE, SIDE).double(), torch.randn(ROWS, SIDE).double()),
        (Linear(SIDE, SIDE), torch.randn(0, SIDE)),
    ],
    ids=["small", "narrow", "float64", "empty"],
)
def test_others_are_multiplied(layer, x):
    assert not convolves(layer, x)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_half_precision_is_multiplied():
    layer, x = Linear(SIDE, SIDE), torch.randn(ROWS, SIDE)
    with torch.autocast("cpu", torch.bfloat16):
        assert not convolves(layer, x)


def test_an_exported_layer_is_linear():
    layer, x = Linear(SIDE, SIDE), torch.randn(ROWS, SIDE)
    graph = torch.export.export(layer, (x,)).graph
    assert [str(node.target) for node in graph.nodes if node.op == "call_function"] == [
        "aten.linear.default"
    ]


@pytest.mark.parametrize("kernel, stride", [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_convolutions_equal_pytorchs(kernel, stride):
    torch.manual_seed(0)
    conv = Conv(8, 6, kernel, stride, padding=kernel // 2)
    arguments = (torch.randn(2, 8, 9, 7), conv.weight, conv.bias)

    def ours(x, weight, bias):
        return torch.func.functional_call(conv, {"weight": weight, "bias": bias}, x)

    def theirs(x, weight, bias):
        return F.conv2d(x, weight, bias, stride, kernel // 2)

    for a, b in zip(
        with_gradients(ours, *arguments), with_gradients(theirs, *arguments), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
