"""Smooth activation functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import profile

from peft_s2a.codecs.chunked import CPU_CHUNK
from peft_s2a.codecs.levels import Derivative, DerivativeCodec, ExactDerivativeCodec
from peft_s2a.memory.allocator import record_memory_events
from peft_s2a.ops.derivatives import (
    Asinh,
    Atan,
    Elu,
    Gelu,
    Hardswish,
    Logsigmoid,
    Mish,
    Sigmoid,
    Silu,
    Softplus,
    Softsign,
    Tanh,
    Tanhshrink,
)
from peft_s2a.ops.pointwise import pointwise
from peft_s2a.settings import BIT_LEVELS

FUNCTIONS: list[tuple[Callable[[Tensor], Tensor], Derivative]] = [
    (F.gelu, Gelu()),
    (lambda x: F.gelu(x, approximate="tanh"), Gelu("tanh")),
    (F.silu, Silu()),
    (torch.sigmoid, Sigmoid()),
    (torch.tanh, Tanh()),
    (F.softplus, Softplus()),
    (F.elu, Elu()),
    (F.mish, Mish()),
    (F.hardswish, Hardswish()),
    (F.softsign, Softsign()),
    (F.tanhshrink, Tanhshrink()),
    (F.logsigmoid, Logsigmoid()),
    (torch.atan, Atan()),
    (torch.asinh, Asinh()),
]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1),
    "sliced": lambda x: x[:, ::2],
    "expanded": lambda x: x[:, :1].expand(-1, 5, -1),
    "channels_last": lambda x: x.unsqueeze(0).contiguous(memory_format=torch.channels_last),
    "empty": lambda x: x[:0],
    "single": lambda x: x[0, 0, 0],
}
all_functions = pytest.mark.parametrize(("function", "derivative"), FUNCTIONS, ids=[str(d) for _, d in FUNCTIONS])


@all_functions
def test_gradcheck(function: Any, derivative: Derivative, leaf: Any) -> None:
    x = leaf(3, 17, dtype=torch.double)
    codec = ExactDerivativeCodec(derivative)
    assert torch.autograd.gradcheck(lambda x: pointwise(x, function, codec), x)


@all_functions
@pytest.mark.parametrize("num_bits", BIT_LEVELS)
def test_error_is_that_of_the_levels(function: Any, derivative: Derivative, num_bits: int, leaf: Any) -> None:
    codec = DerivativeCodec(derivative, num_bits)
    grid = torch.linspace(-10, 10, 20_001)
    worst = (codec.decode(codec.encode(grid), grid.numel(), torch.float32) - derivative(grid)).abs().max()
    worst += 1.5e-3  # between two points of the grid
    x, grad = leaf(5, 300, scale=2), leaf(5, 300, needs=False)
    (dx,) = torch.autograd.grad(pointwise(x, function, codec), x, grad)
    assert ((dx - grad * derivative(x.detach())).abs() <= grad.abs() * worst + 1e-6).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_layouts_and_dtypes(layout: str, dtype: torch.dtype, leaf: Any, same_as_torch: Any) -> None:
    x = leaf(4, 6, 8, dtype=dtype)
    change = LAYOUTS[layout]
    codec = ExactDerivativeCodec(Gelu())
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: 1e-5}[dtype]
    same_as_torch(
        lambda x: pointwise(change(x), F.gelu, codec), lambda x: F.gelu(change(x)), x, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_do_not_depend_on_the_layout(layout: str, leaf: Any) -> None:
    x = LAYOUTS[layout](leaf(4, 6, 8).detach())
    codec = DerivativeCodec(Gelu(), 4)
    copy = x.clone(memory_format=torch.contiguous_format).requires_grad_()
    strided = x.requires_grad_()
    (expected,) = torch.autograd.grad(pointwise(copy, F.gelu, codec).sum(), copy)
    (actual,) = torch.autograd.grad(pointwise(strided, F.gelu, codec).sum(), strided)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("codec", [ExactDerivativeCodec(Gelu()), DerivativeCodec(Gelu(), 4)], ids=str)
def test_pieces(codec: Any, leaf: Any, request: pytest.FixtureRequest) -> None:
    x, grad = leaf(7, 500), leaf(7, 500, needs=False)
    (whole,) = torch.autograd.grad(pointwise(x, F.gelu, codec), x, grad)
    request.getfixturevalue("small_chunks")
    (pieces,) = torch.autograd.grad(pointwise(x, F.gelu, codec), x, grad)
    # vectorised and scalar ends of a loop may differ in the last bit
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("num_bits", BIT_LEVELS)
def test_bytes_kept(num_bits: int, leaf: Any, kept_bytes: Any) -> None:
    x = leaf(4, 1024)
    codec = DerivativeCodec(Gelu(), num_bits)
    assert kept_bytes(lambda: pointwise(x, F.gelu, codec)) == 4 * (1024 * num_bits // 8 + 2)
    assert kept_bytes(lambda: pointwise(x.detach(), F.gelu, codec)) == 0


@all_functions
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_where_torch_is_not(function: Any, derivative: Derivative, poison: float, leaf: Any) -> None:
    x = leaf(2, 1024).detach()
    x[1, 7] = poison
    x.requires_grad_()
    (expected,) = torch.autograd.grad(function(x).sum(), x)
    (actual,) = torch.autograd.grad(pointwise(x, function, DerivativeCodec(derivative, 4)).sum(), x)
    assert actual[expected.isnan()].isnan().all()
    assert actual[0].isfinite().all()


def test_double_backward(leaf: Any, refuses_double_backward: Any) -> None:
    refuses_double_backward(lambda x: pointwise(x, F.gelu, DerivativeCodec(Gelu(), 4)), leaf(4, 256))


def test_two_forwards_and_retained_graph(leaf: Any) -> None:
    codec = ExactDerivativeCodec(Gelu())
    x, y = leaf(4, 5), leaf(4, 5)
    first, second = pointwise(x, F.gelu, codec), pointwise(y, F.gelu, codec)
    (dx,) = torch.autograd.grad(first.sum(), x, retain_graph=True)
    (again,) = torch.autograd.grad(first.sum(), x)
    (dy,) = torch.autograd.grad(second.sum(), y)
    assert torch.equal(dx, again)
    torch.testing.assert_close(dx, Gelu()(x.detach()))
    torch.testing.assert_close(dy, Gelu()(y.detach()))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_overwriting(dtype: torch.dtype, layout: str, leaf: Any, small_chunks: None) -> None:
    x, codec = leaf(4, 60, 80, dtype=dtype), DerivativeCodec(Gelu(), 4)
    found = []
    for overwrite in (False, True):
        hidden = LAYOUTS[layout](x * 1)
        output = pointwise(hidden, F.gelu, codec, overwrite=overwrite)
        assert (output.data_ptr() == hidden.data_ptr()) == overwrite
        assert output.stride() == hidden.stride()
        assert output._base is None
        found.append((output.detach().clone(), torch.autograd.grad(output.sum(), x)[0]))
    # torch's own kernels for pieces and wholes may round differently
    rtol = 2**-7 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(found[1][0], found[0][0], rtol=rtol, atol=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-6, atol=1e-6)


def test_what_autograd_has_kept_of_an_overwritten_input_is_an_error(leaf: Any) -> None:
    x = leaf(4, 512)
    hidden = x.exp()  # keeps its output
    output = pointwise(hidden, F.gelu, DerivativeCodec(Gelu(), 4), overwrite=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_peak_of_an_overwriting_step(leaf: Any) -> None:
    """Input and its gradient have one place each; beside them are codes and one piece."""
    x, grad_of_output = leaf(64, 4096), leaf(64, 4096, needs=False)
    codec = DerivativeCodec(Gelu(), 4)
    codec.encode(x.detach())  # makes the table

    def step() -> None:
        output = pointwise(x * 1, F.gelu, codec, overwrite=True)
        (output * grad_of_output).sum().backward()

    live = peak = 0
    for event in record_memory_events(step, torch.device("cpu")):
        live += event.bytes
        peak = max(peak, live)
    codes = x.numel() // 2 + 2 * x.numel() // 1024
    # at the peak: the output, its product with the gradient; later two gradients of the same size
    assert peak <= 2 * x.nbytes + codes + 5 * 4 * CPU_CHUNK


def test_backward_of_an_overwriting_step_copies_nothing(leaf: Any) -> None:
    output = pointwise(leaf(64, 1024) * 1, F.gelu, DerivativeCodec(Gelu(), 4), overwrite=True)
    with profile() as profiler:
        (output * 3).sum().backward()
    names = {event.name for event in profiler.events()}
    assert not names & {"aten::clone", "CopySlices", "aten::as_strided_scatter"}
    assert "PointwiseFunctionBackward" in names
