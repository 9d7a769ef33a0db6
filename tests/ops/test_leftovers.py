"""What torch's own operators save goes through codes, also under the hooks of others."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from peft_s2a.codecs.affine import GroupAffineCodec
from peft_s2a.codecs.stand_in import BoolCodec, IndexCodec
from peft_s2a.mode import ActivationMode
from peft_s2a.ops.leftovers import MIN_ELEMENTS, CodedTensor, LeftoverHooks, SavedCodecs
from peft_s2a.settings import ActivationSettings


class Coded:
    """Enters the hooks, as the interceptor does."""

    def __init__(self, hooks: LeftoverHooks, num_bits: int = 8) -> None:
        self.hooks = hooks
        self.codec = GroupAffineCodec(num_bits)

    def __enter__(self) -> bool:
        self.entered = self.hooks.enter()
        self.coding = self.hooks.coding(SavedCodecs(self.codec, self.codec), ())
        self.coding.__enter__()
        return self.entered

    def __exit__(self, *_: object) -> None:
        self.coding.__exit__(None, None, None)
        if self.entered:
            self.hooks.leave()


def gradient(x: Tensor, hooks: LeftoverHooks | None = None) -> Tensor:
    y = x * 2
    if hooks is None:
        return torch.autograd.grad(torch.exp(torch.cos(y)).sum(), x)[0]
    with Coded(hooks):
        total = torch.exp(torch.cos(y)).sum()
    return torch.autograd.grad(total, x)[0]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_large_tensors_are_coded_and_gradients_close(x: Tensor) -> None:
    dtypes: list[torch.dtype] = []

    def pack(t: Tensor) -> Tensor:
        dtypes.append(t.dtype)
        return t

    exact = gradient(x)
    with saved_tensors_hooks(pack, lambda t: t):
        coded = gradient(x, LeftoverHooks())
    assert set(dtypes) == {torch.uint8, torch.bfloat16}
    assert 0 < (coded - exact).norm() / exact.norm() < 0.02


def test_layouts_and_dtypes() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        y = torch.randn(4, 8, 32, 33, dtype=dtype).to(memory_format=torch.channels_last)
        handle = LeftoverHooks().encode(y, GroupAffineCodec(8), None)
        assert isinstance(handle, CodedTensor)
        hooks = LeftoverHooks()
        with Coded(hooks):
            z = y.clone().requires_grad_()
            total = torch.cos(z).float().sum()
        (grad,) = torch.autograd.grad(total, z)
        assert grad.dtype == dtype
        torch.testing.assert_close(grad, -torch.sin(y), rtol=0.05, atol=0.05)


def test_small_tensors_parameters_constants_and_doubles_are_kept_as_they_are() -> None:
    hooks = LeftoverHooks()
    affine, weight = GroupAffineCodec(8), nn.Parameter(torch.zeros(128, MIN_ELEMENTS // 128))
    argument, constant = torch.zeros(MIN_ELEMENTS, requires_grad=True), torch.zeros(MIN_ELEMENTS)
    assert hooks.codec_of(torch.zeros(MIN_ELEMENTS)) is None
    with hooks.coding(SavedCodecs(others=affine), (argument, constant, weight)):
        assert hooks.codec_of(torch.zeros(MIN_ELEMENTS)) is affine
        assert hooks.codec_of(argument.detach()) is None
        assert hooks.codec_of(constant) is None
        assert hooks.codec_of(torch.zeros(MIN_ELEMENTS - 1)) is None
        assert hooks.codec_of(torch.zeros(MIN_ELEMENTS, dtype=torch.double)) is None
        assert hooks.codec_of(torch.zeros(MIN_ELEMENTS, dtype=torch.int64)) is None
        assert hooks.codec_of(weight) is None
        assert hooks.codec_of(weight.t()) is None
        assert hooks.codec_of(weight.bfloat16()) is None  # autocast saves such copies
    codecs = SavedCodecs(affine, indices=IndexCodec(5), masks=BoolCodec())
    with hooks.coding(codecs, (argument, constant)):
        assert hooks.codec_of(argument.view(2, -1)) is affine
        assert hooks.codec_of(torch.zeros(MIN_ELEMENTS)) is None
        assert hooks.codec_of(torch.zeros(MIN_ELEMENTS, dtype=torch.int64)) == IndexCodec(5)
        assert hooks.codec_of(torch.zeros(MIN_ELEMENTS, dtype=torch.bool)) == BoolCodec()


def test_nothing_is_coded_twice(x: Tensor) -> None:
    hooks = LeftoverHooks()
    with Coded(hooks) as first, Coded(hooks) as second:
        y = x * 1
        total = torch.cos(y).sum() + torch.sin(y).sum()
        assert first
        assert not second
        assert len(hooks._state.coded) == 1
    assert not hooks._state.coded
    torch.autograd.grad(total, x)


def test_a_change_in_place_is_seen(x: Tensor) -> None:
    hooks = LeftoverHooks()
    with Coded(hooks):
        y = x * 1
        z = torch.cos(y)
        y = y.add_(1)
        total = (z + torch.cos(y)).sum()
    (grad,) = torch.autograd.grad(total, x)
    torch.testing.assert_close(grad, -torch.sin(x) - torch.sin(x + 1), rtol=0.05, atol=0.05)


def test_offloading_still_sees_the_codes(x: Tensor) -> None:
    expected = gradient(x, LeftoverHooks())
    with save_on_cpu():
        assert torch.equal(gradient(x, LeftoverHooks()), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_a_checkpoint(x: Tensor, reentrant: bool) -> None:
    hooks = LeftoverHooks()

    def inner(y: Tensor) -> Tensor:
        with Coded(hooks):
            return torch.exp(torch.cos(y))

    plain = torch.autograd.grad(inner(x * 2).sum(), x)[0]
    (grad,) = (
        torch.autograd.grad(checkpoint(inner, x * 2, use_reentrant=reentrant).sum(), x)
        if not reentrant
        else (_backward(checkpoint(inner, x * 2, use_reentrant=True).sum(), x),)
    )
    assert torch.equal(grad, plain)


def _backward(total: Tensor, x: Tensor) -> Tensor:
    total.backward()
    assert x.grad is not None
    return x.grad


def test_nan_stays_nan(x: Tensor) -> None:
    with torch.no_grad():
        x[0, 0] = float("nan")
    assert gradient(x, LeftoverHooks())[0, 0].isnan()


def test_copies_start_empty() -> None:
    copy = pickle.loads(pickle.dumps(LeftoverHooks()))
    assert not copy._state.coded


UNFIT = {
    "amax": lambda x: x.amax(1),
    "amin": lambda x: x.amin(1),
    "max": lambda x: x.max(),
    "infinite norm": lambda x: torch.linalg.vector_norm(x, float("inf"), dim=1),
    "abs": lambda x: x.abs(),
    "clamp": lambda x: x.clamp(min=0),
    "threshold": lambda x: torch.nn.functional.threshold(x, 0.1, 0.0),
    "cumprod": lambda x: torch.cumprod(x, 1),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_backward_that_an_error_would_spoil_stays_exact(name: str, x: Tensor) -> None:
    function = UNFIT[name]
    (expected,) = torch.autograd.grad(function(x * 1).sum(), x)
    mode = ActivationMode(ActivationSettings.from_config(4))
    assert mode.leftovers is not None
    mode.leftovers.enter()
    with mode:
        total = function(x * 1).sum()
    mode.leftovers.leave()
    torch.testing.assert_close(torch.autograd.grad(total, x)[0], expected)
