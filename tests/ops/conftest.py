"""What the tests of all operators share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from peft_s2a.codecs import chunked
from peft_s2a.ops import attention, softmax

Leaf = Callable[..., Tensor]
KeptBytes = Callable[..., int]


@pytest.fixture
def leaf() -> Leaf:
    """Makes a normal random tensor that needs a gradient."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, needs: bool = True) -> Tensor:
        values = torch.randn(shape, dtype=torch.float64, generator=generator) * scale
        return values.to(dtype).requires_grad_(needs)

    return make


@pytest.fixture
def kept_bytes() -> KeptBytes:
    """Counts the bytes that a call saves for backward, without those of the tensors in `known`."""

    def count(call: Callable[[], Any], known: Sequence[Tensor] = ()) -> int:
        addresses = {t.untyped_storage().data_ptr() for t in known}
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            if tensor.untyped_storage().data_ptr() not in addresses:
                total += tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda t: t):
            call()
        return total

    return count


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the pieces of a CPU small, so that small tensors have several."""
    for module in (chunked, softmax):
        monkeypatch.setattr(module, "CPU_CHUNK", 64)
    monkeypatch.setattr(attention, "CPU_CHUNK", 1)  # one item of a batch at a time


def gradients(output: Tensor, inputs: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, inputs, grad)


@pytest.fixture
def same_as_torch() -> Callable[..., None]:
    """Asserts that two calls give the same output and gradients, bit for bit (or within the tolerances given)."""

    def check(
        ours: Callable[..., Tensor],
        theirs: Callable[..., Tensor],
        *inputs: Tensor | None,
        rtol: float = 0,
        atol: float = 0,
    ) -> None:
        results = []
        for call in (ours, theirs):
            output = call(*inputs)
            wanted = [t for t in inputs if t is not None and t.requires_grad]
            grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
            results.append((output.detach(), *torch.autograd.grad(output, wanted, grad)))
        for our, their in zip(*results, strict=True):
            assert our.dtype == their.dtype
            assert our.shape == their.shape
            torch.testing.assert_close(our, their, rtol=rtol, atol=atol, equal_nan=True)
        torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0, equal_nan=True)

    return check


@pytest.fixture
def refuses_double_backward() -> Callable[[Callable[..., Tensor], Tensor], None]:
    """Asserts that a second derivative is an error that says so, and `torch.func.grad` is one too."""

    def check(call: Callable[..., Tensor], input: Tensor) -> None:
        (grad,) = torch.autograd.grad(call(input).sum(), input, create_graph=True)
        if grad.requires_grad:
            with pytest.raises(RuntimeError, match="once_differentiable"):
                grad.sum().backward()
        with pytest.raises(RuntimeError, match="setup_context"):
            torch.func.grad(lambda x: call(x).sum())(input.detach())

    return check
