"""Levels of a derivative: the best clusters, levels without bias, and codes of exactly so many bits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_s2a.codecs.levels import (
    ROW,
    Derivative,
    DerivativeCodec,
    ExactDerivativeCodec,
    level_table,
    optimal_clusters,
    reference_density,
)
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
from peft_s2a.settings import BIT_LEVELS

DERIVATIVES: list[Derivative] = [
    Gelu(),
    Gelu("tanh"),
    Silu(),
    Sigmoid(),
    Tanh(),
    Softplus(),
    Elu(),
    Mish(),
    Hardswish(),
]

ALL: list[Derivative] = [
    *DERIVATIVES,
    Silu(1.702),
    Elu(1.6732632423543772, 1.0507009873554805),
    Softsign(),
    Tanhshrink(),
    Logsigmoid(),
    Atan(),
    Asinh(),
]


def squared_error(values: Tensor, weights: Tensor, labels: Tensor, means: Tensor) -> float:
    return float((weights * (values - means[labels]).square()).sum())


def best_by_brute_force(values: Tensor, weights: Tensor, num_clusters: int) -> float:
    """Tries every way to cut the sorted values into intervals."""
    order = values.argsort()
    v, w = values[order], weights[order]
    best = math.inf
    for cuts in itertools.combinations_with_replacement(range(len(v) + 1), num_clusters - 1):
        error = 0.0
        for lo, hi in itertools.pairwise((0, *cuts, len(v))):
            if hi > lo:
                mean = (w[lo:hi] * v[lo:hi]).sum() / w[lo:hi].sum()
                error += float((w[lo:hi] * (v[lo:hi] - mean).square()).sum())
        best = min(best, error)
    return best


@given(
    pairs=st.lists(st.tuples(st.floats(-3, 3), st.floats(0.01, 2)), min_size=1, max_size=7),
    num_clusters=st.integers(1, 4),
)
def test_clusters_are_the_best_there_are(pairs: list[tuple[float, float]], num_clusters: int) -> None:
    values = torch.tensor([p[0] for p in pairs], dtype=torch.double)
    weights = torch.tensor([p[1] for p in pairs], dtype=torch.double)
    labels, means = optimal_clusters(values, weights, num_clusters)
    assert labels.shape == values.shape
    assert means.shape == (num_clusters,)
    assert means.isfinite().all()
    found = squared_error(values, weights, labels, means)
    assert found == pytest.approx(best_by_brute_force(values, weights, num_clusters), abs=1e-9)


def test_means_are_the_means_of_their_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, dtype=torch.double, generator=generator)
    weights = torch.rand(50, dtype=torch.double, generator=generator)
    labels, means = optimal_clusters(values, weights, 8)
    for k in range(8):
        of_cluster = labels == k
        mean = (weights * values)[of_cluster].sum() / weights[of_cluster].sum()
        torch.testing.assert_close(means[k], mean)


def reference_inputs() -> tuple[Tensor, Tensor]:
    """A fine grid, and its weights under the density that the levels are chosen for."""
    x = torch.linspace(-8, 8, 160_001, dtype=torch.double)[:-1] + 5e-5
    weights = reference_density(x)
    return x, weights / weights.sum()


def error_of(derivative: Derivative, num_bits: int, x: Tensor) -> Tensor:
    codec = DerivativeCodec(derivative, num_bits)
    decoded = codec.decode(codec.encode(x.float()), x.numel(), torch.float32)
    return decoded.double() - derivative(x)


@pytest.mark.parametrize("num_bits", [1, 2, 3, 4])
@pytest.mark.parametrize("derivative", DERIVATIVES, ids=str)
def test_levels_have_no_bias(derivative: Derivative, num_bits: int) -> None:
    x, weights = reference_inputs()
    error = error_of(derivative, num_bits, x)
    assert abs(float((weights * error).sum())) < 1e-4


@pytest.mark.parametrize("num_bits", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("derivative", DERIVATIVES, ids=str)
def test_levels_are_no_worse_than_uniform_ones(derivative: Derivative, num_bits: int) -> None:
    x, weights = reference_inputs()
    exact = derivative(x)
    step = (exact.max() - exact.min()) / (2**num_bits - 1)
    uniform = ((exact - exact.min()) / step).round() * step + exact.min()
    error = error_of(derivative, num_bits, x)
    # a little is lost to the width of the cells
    assert float((weights * error.square()).sum()) <= float((weights * (uniform - exact).square()).sum()) + 3e-5


WIDE = torch.cat([torch.linspace(-40, 40, 80_001), torch.logspace(1.7, 38, 200), -torch.logspace(1.7, 38, 200)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_bits", BIT_LEVELS)
@pytest.mark.parametrize("derivative", ALL, ids=str)
def test_the_error_is_bounded_everywhere(derivative: Derivative, num_bits: int, dtype: torch.dtype) -> None:
    x = WIDE.to(dtype)
    codec = DerivativeCodec(derivative, num_bits)
    decoded = codec.decode(codec.encode(x), x.numel(), torch.float32).double()
    exact = derivative(x.double().clamp(-1e6, 1e6))
    error, inside = (decoded - exact).abs(), x.abs() <= 8
    # beyond the cells no more than at the worst place within them, or than the derivative still has to go
    ends = derivative(torch.tensor([-8.0, 8.0], dtype=torch.double))
    to_go = (exact - torch.where(x < 0, ends[0], ends[1])).abs()
    assert (error[~inside] <= error[inside].max() + to_go[~inside] + 1e-6).all()
    assert error.max() < 1


@pytest.mark.parametrize("num_bits", [3, 4, 6, 8])
@pytest.mark.parametrize("derivative", ALL, ids=str)
def test_far_outside_the_error_is_no_more_than_usual(derivative: Derivative, num_bits: int) -> None:
    x = torch.tensor([-1e6, -100.0, -8.0, 8.0, 100.0, 1e6])
    codec = DerivativeCodec(derivative, num_bits)
    decoded = codec.decode(codec.encode(x), 6, torch.float32)
    limits = derivative(torch.tensor([-1e6] * 3 + [1e6] * 3, dtype=torch.double)).float()
    ends = derivative(torch.tensor([-8.0] * 3 + [8.0] * 3, dtype=torch.double)).float()
    reached = (ends - limits).abs() < 0.03
    assert reached.all() or derivative == Asinh()
    grid, weights = reference_inputs()
    usual = float((weights * error_of(derivative, num_bits, grid).square()).sum()) ** 0.5
    assert ((decoded - limits)[reached].abs() <= usual + 2e-6).all()


def test_wide_inputs_have_no_bias_where_levels_alone_had() -> None:
    for derivative in (Silu(), Elu(), Softplus(), Mish()):
        x = torch.tensor([-50.0, 50.0])
        codec = DerivativeCodec(derivative, 4)
        decoded = codec.decode(codec.encode(x), 2, torch.float32)
        torch.testing.assert_close(decoded, torch.tensor([0.0, 1.0]), rtol=0, atol=0.005)


def test_a_pinned_number_stands_for_its_cluster() -> None:
    values = torch.cat([torch.linspace(0.1, 1, 50), torch.linspace(2, 3, 50)]).double()
    labels, levels = optimal_clusters(values, torch.ones(100), 4, (0.0, 2.4))
    assert 0.0 in levels
    assert 2.4 in levels
    assert levels[labels[0]] == 0.0
    assert levels[labels[50 + 20]] == 2.4


def test_error_falls_with_every_bit() -> None:
    x, weights = reference_inputs()
    errors = [float((weights * error_of(Gelu(), b, x).square()).sum()) for b in BIT_LEVELS]
    assert errors == sorted(errors, reverse=True)
    # at x ~ N(0, 1): 3.8e-2, 8.0e-3, 1.9e-3, 5.9e-4 for 1 to 4 bits with levels chosen for that density
    assert errors[3] < 1e-3


def test_gelu_levels_are_symmetric() -> None:
    levels = level_table(Gelu(), 4).levels
    torch.testing.assert_close(levels, 1 - levels.flip(0), rtol=0, atol=5e-3)


@pytest.mark.parametrize("num_bits", BIT_LEVELS)
@pytest.mark.parametrize("numel", [0, 1, 1024, 1025, 3000])
def test_bytes_kept(num_bits: int, numel: int) -> None:
    kept = DerivativeCodec(Gelu(), num_bits).encode(torch.ones(numel))
    rows = math.ceil(numel / ROW)
    assert sum(t.numel() * t.element_size() for t in kept) == rows * (ROW * num_bits // 8 + 2)
    assert all(t.shape[0] == rows for t in kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_decodes_levels_in_the_dtype_asked_for(dtype: torch.dtype) -> None:
    codec = DerivativeCodec(Gelu(), 2)
    decoded = codec.decode(codec.encode(torch.linspace(-3, 3, 100).to(dtype)), 100, dtype)
    assert decoded.dtype == dtype
    assert set(decoded.tolist()) <= set(level_table(Gelu(), 2).levels.to(dtype).tolist())


@pytest.mark.parametrize("derivative", DERIVATIVES, ids=str)
def test_huge_finite_inputs_get_the_outermost_cells(derivative: Derivative) -> None:
    x = torch.tensor([3e38, -3e38, 1e30, -1e30, 8.1, -8.1]).repeat(400)
    codec = DerivativeCodec(derivative, 4)
    decoded = codec.decode(codec.encode(x), x.numel(), torch.float32)
    assert decoded.isfinite().all()
    torch.testing.assert_close(decoded, derivative(x.clamp(-8, 8).double()).float(), rtol=0, atol=0.05)


@pytest.mark.parametrize("derivative", DERIVATIVES, ids=str)
def test_nan_makes_the_row_nan_and_no_other(derivative: Derivative) -> None:
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    x[1500] = float("nan")
    codec = DerivativeCodec(derivative, 4)
    decoded = codec.decode(codec.encode(x), 3000, torch.float32)
    assert decoded[1024:2048].isnan().all()
    assert decoded[:1024].isfinite().all()
    assert decoded[2048:].isfinite().all()


@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
@pytest.mark.parametrize("derivative", DERIVATIVES, ids=str)
def test_an_infinity_is_nan_exactly_where_the_derivative_is(derivative: Derivative, infinity: float) -> None:
    x = torch.zeros(10)
    x[3] = infinity
    codec = DerivativeCodec(derivative, 4)
    decoded = codec.decode(codec.encode(x), 10, torch.float32)
    exact = derivative(x)
    at_either_end = derivative(torch.tensor([math.inf, -math.inf]))
    if exact[3].isnan():
        assert decoded[3].isnan()
    if at_either_end.isfinite().all():
        torch.testing.assert_close(decoded, exact, rtol=0, atol=0.1)


def test_the_table_does_not_depend_on_where_it_was_first_asked_for() -> None:
    derivative = Softplus(beta=1.37)  # not asked for by any other test
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta"):
        level_table(derivative, 3)
    levels = level_table(derivative, 3).levels
    assert type(levels) is Tensor
    assert levels.device.type == "cpu"
    x = torch.linspace(-3, 3, 50)
    codec = DerivativeCodec(derivative, 3)
    torch.testing.assert_close(codec.decode(codec.encode(x), 50, torch.float32), derivative(x), rtol=0, atol=0.15)


def test_codecs_work_under_fake_tensors_and_afterwards() -> None:
    codec = DerivativeCodec(Softplus(beta=1.41), 4)  # not asked for by any other test
    with FakeTensorMode(allow_non_fake_inputs=True):
        decoded = codec.decode(codec.encode(torch.zeros(50)), 50, torch.float32)
        assert decoded.shape == (50,)
    decoded = codec.decode(codec.encode(torch.zeros(50)), 50, torch.float32)
    torch.testing.assert_close(decoded, torch.full((50,), 0.5), rtol=0, atol=0.1)


def test_exact_codec_evaluates_the_derivative() -> None:
    x = torch.linspace(-4, 4, 33, dtype=torch.double)
    codec = ExactDerivativeCodec(Gelu())
    assert torch.equal(codec.decode(codec.encode(x), 33, torch.double), Gelu()(x))
