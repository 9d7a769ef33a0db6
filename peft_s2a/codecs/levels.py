"""Derivative codes: the index of a level of a piecewise-constant derivative, without any scale.

Backward of `y = h(x)` needs `h'(x)` alone. The inputs are cut into 1024 cells; the cells are clustered by their value
of h' so that the expected squared error under a reference density is least. In one dimension optimal clusters are
intervals of the values, so dynamic programming finds them exactly; each level is its cluster's mean, so the error has
zero mean. From 3 bits on a limit of h' that inputs far outside would miss by more than the usual error, since the
reference density knows nothing of them, is a level itself. Encoding is one table lookup by cell, decoding one by code.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .backend import run
from .base import Kept
from .packing import pack, unpack_numbers

Derivative = Callable[[Tensor], Tensor]

ROW = 1024
_CELLS = 1024
_RANGE = 8.0
"""Cells cover [-8, 8); what lies outside belongs to the first and the last cell."""

_MIN_BITS_FOR_LIMITS = 3
_REACHED = 0.03
"""A limit is a level if the derivative is this close to it at the end of the cells."""
_MIN_FREE_MASS = 0.01


@dataclass(frozen=True)
class LevelTable:
    """`cell_codes` (1024,) uint8: code of each cell. `levels` (2 ** num_bits,) float32: derivative of each code."""

    cell_codes: Tensor
    levels: Tensor


def reference_density(x: Tensor) -> Tensor:
    """Density of an operator's input for which levels are chosen: a normal of deviation 2.

    Pre-activations of trained backbones are wider than a unit normal; levels for too narrow a density are biased in the
    tails, where the derivative is all but constant and most inputs are.
    """
    return torch.exp(-0.125 * x.square()) / math.sqrt(8 * math.pi)


def optimal_clusters(
    values: Tensor, weights: Tensor, num_clusters: int, pinned: tuple[float, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Clusters of numbers with the least weighted squared error, by dynamic programming (exact).

    Args:
        values, weights: `(n,)`, any order.
        pinned: different numbers, fewer than clusters, that are to stand for the cluster that they lie in.

    Returns:
        Cluster of each value, `(n,)` int64, and what stands for the clusters, `(num_clusters,)`: means, or pinned
        numbers. Clusters that cannot be filled (fewer distinct values) repeat the last one.
    """
    order = torch.argsort(values)
    v, w = values.double()[order], weights.double()[order]
    n = v.numel()
    zero = torch.zeros(1, dtype=torch.double)
    mass = torch.cat([zero, w.cumsum(0)])
    first = torch.cat([zero, (w * v).cumsum(0)])
    second = torch.cat([zero, (w * v * v).cumsum(0)])
    # cost[i, j]: squared error of one cluster over sorted values i .. j - 1
    span = (mass[None, :] - mass[:, None]).clamp_min(1e-300)
    cost = second[None, :] - second[:, None] - (first[None, :] - first[:, None]).square() / span
    places = [min(int((v < number).sum()), n - 1) for number in pinned]  # of the value that each is put to
    index = torch.arange(n + 1)
    for number, place in zip(pinned, places, strict=True):
        has = (index[:, None] <= place) & (index[None, :] > place)
        about = second - 2 * number * first + number**2 * mass
        cost = torch.where(has, about[None, :] - about[:, None], cost)
    for one, other in itertools.combinations(places, 2):
        has_both = (index[:, None] <= min(one, other)) & (index[None, :] > max(one, other))
        cost = cost.masked_fill(has_both, math.inf)
    cost = cost.clamp_min_(0).masked_fill_(torch.ones(n + 1, n + 1, dtype=torch.bool).tril(0), math.inf)
    cost.diagonal().zero_()
    best = cost[0]
    starts = []
    for _ in range(1, num_clusters):
        best, start = (best[:, None] + cost).min(0)
        starts.append(start)
    borders = [n]
    for start in reversed(starts):
        borders.append(int(start[borders[-1]]))
    borders.append(0)
    borders.reverse()
    labels = torch.empty(n, dtype=torch.long)
    means = torch.empty(num_clusters, dtype=torch.double)
    for k, (lo, hi) in enumerate(itertools.pairwise(borders)):
        labels[order[lo:hi]] = k
        if hi > lo:
            means[k] = (first[hi] - first[lo]) / (mass[hi] - mass[lo])
        else:
            means[k] = means[k - 1] if k else v[0]
        for number, place in zip(pinned, places, strict=True):
            if lo <= place < hi:
                means[k] = number
    return labels, means


def _limits(derivative: Derivative) -> tuple[float | None, float | None]:
    """What the derivative tends to at minus and plus infinity, where it has all but come to it within the cells."""
    ends, far, farther = (
        derivative(torch.tensor([-x, x], dtype=torch.double)) for x in (_RANGE, 1e3 * _RANGE, 1e4 * _RANGE)
    )
    reached = ((far - farther).abs() < 1e-3) & ((ends - far).abs() < _REACHED)
    left, right = (round(float(x), 6) + 0.0 if ok else None for x, ok in zip(farther, reached, strict=True))
    return left, right


def _with_limits(
    labels: Tensor, levels: Tensor, values: Tensor, weights: Tensor, limits: tuple[float | None, float | None]
) -> tuple[Tensor, Tensor]:
    """Clusters and levels again, with the limits as levels if an outermost cell misses its by more than the error."""
    typical = (weights * (levels[labels] - values).square()).sum().div(weights.sum()).sqrt()
    ends = {cell: limit for cell, limit in zip((0, -1), limits, strict=True) if limit is not None}
    if all(abs(levels[labels[cell]] - limit) <= typical for cell, limit in ends.items()):
        return labels, levels
    pinned = tuple(set(ends.values()))
    labels, levels = optimal_clusters(values, weights, len(levels), pinned)
    for cell, limit in ends.items():
        labels[cell] = int((levels - limit).abs().argmin())
    free = torch.tensor([float(level) not in pinned for level in levels])
    mass = weights[free[labels]].sum()
    if mass > _MIN_FREE_MASS:  # these take up the mean error of the pinned
        levels[free] += (weights * (values - levels[labels])).sum() / mass
    return labels, levels


@functools.cache
def level_table(derivative: Derivative, num_bits: int) -> LevelTable:
    """The table of one derivative; computed once in a process, wherever that is (50 ms at 4 bits, 0.5 s at 8)."""
    with unset_fake_temporarily(), torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        edges = torch.linspace(-_RANGE, _RANGE, _CELLS + 1, dtype=torch.double)
        centres = (edges[1:] + edges[:-1]) / 2
        weights = reference_density(centres)
        values = derivative(centres)
        labels, levels = optimal_clusters(values, weights, 2**num_bits)
        if num_bits >= _MIN_BITS_FOR_LIMITS:
            labels, levels = _with_limits(labels, levels, values, weights, _limits(derivative))
        return LevelTable(labels.to(torch.uint8), levels.float())


@functools.lru_cache(maxsize=256)
def _table_on(derivative: Derivative, num_bits: int, device: torch.device) -> LevelTable:
    table = level_table(derivative, num_bits)
    with unset_fake_temporarily():
        return LevelTable(table.cell_codes.to(device), table.levels.to(device))


@functools.cache
def _bounded_at_infinity(derivative: Derivative) -> bool:
    with unset_fake_temporarily():
        return bool(derivative(torch.tensor([-math.inf, math.inf], device="cpu")).isfinite().all())


class _Store:
    """Tables by name: a tracer reads them as attributes, which become inputs of its graph."""


_STORE = _Store()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _stored(derivative: Derivative, num_bits: int, device: torch.device) -> str:
    """Name of the table in the store, where it is put if need be; a constant of a traced graph."""
    name = f"{derivative!r} {num_bits} {device}".replace(".", "_")  # a dot would mean an attribute of an attribute
    if not hasattr(_STORE, name):
        setattr(_STORE, name, _table_on(derivative, num_bits, device))
    return name


def _table(derivative: Derivative, num_bits: int, device: torch.device) -> LevelTable:
    if torch.compiler.is_compiling():
        table: LevelTable = getattr(_STORE, _stored(derivative, num_bits, device))
        return table
    return _table_on(derivative, num_bits, device)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _finite_at_infinity(derivative: Derivative) -> bool:
    return _bounded_at_infinity(derivative)


@dataclass(frozen=True)
class DerivativeCodec:
    """Encodes inputs, decodes derivatives: exactly `num_bits` bits per element, in rows of 1024 elements.

    One bfloat16 more is kept for each row: zero, or NaN where the row held a NaN, or an infinity at which the
    derivative is NaN, so that the gradient is NaN where torch's would be.
    """

    derivative: Derivative
    num_bits: int
    backend: str = "eager"

    @property
    def unit(self) -> int:
        return ROW

    def encode(self, values: Tensor) -> Kept:
        rows = math.ceil(values.numel() / ROW)
        padding = rows * ROW - values.numel()
        if padding:
            values = torch.nn.functional.pad(values, (0, padding))
        kept: Kept = run(self.backend, DerivativeCodec.encode_rows, self, values.view(rows, ROW))
        return kept

    def encode_rows(self, rows: Tensor) -> Kept:
        """Encodes whole rows, `(R, 1024)`: a kernel."""
        values = rows.float()
        if _finite_at_infinity(self.derivative):
            values = values.clamp(-_RANGE, _RANGE)
        # zero before it is summed: a sum of huge numbers would overflow
        poison = (values * 0).sum(1).to(torch.bfloat16)
        cells = (values * (_CELLS / (2 * _RANGE))).add_(_CELLS / 2)
        return pack(_codes(self, cells), self.num_bits), poison

    def decode(self, kept: Kept, numel: int, dtype: torch.dtype) -> Tensor:
        rows: Tensor = run(self.backend, _decode_rows, (self, dtype), *kept)
        return rows.view(-1)[:numel]

    def decode_rows(self, kept: Kept) -> Tensor:
        """Derivatives of whole rows, `(R, 1024)` float32: part of a kernel."""
        packed, poison = kept
        levels = _levels(self, unpack_numbers(packed, self.num_bits, ROW))
        return levels.add_(poison.float().unsqueeze(1))


def _decode_rows(spec: tuple[DerivativeCodec, torch.dtype], packed: Tensor, poison: Tensor) -> Tensor:
    codec, dtype = spec
    return codec.decode_rows((packed, poison)).to(dtype)


MAX_COMPARISONS = 64
"""A compiled kernel compares with up to so many borders, which vectorises; a lookup does not."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _steps(derivative: Derivative, num_bits: int) -> tuple[tuple[int, int], ...]:
    """First cell and code of every run of cells that have the same code."""
    codes = level_table(derivative, num_bits).cell_codes.tolist()
    return tuple((i, code) for i, code in enumerate(codes) if i == 0 or codes[i - 1] != code)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _level_list(derivative: Derivative, num_bits: int) -> tuple[float, ...]:
    return tuple(level_table(derivative, num_bits).levels.tolist())


def _codes(codec: DerivativeCodec, cells: Tensor) -> Tensor:
    """Codes, uint8 or whole numbers in float32, of cells (with fractions), which may be written over.

    NaN has the code of the first cell.
    """
    if torch.compiler.is_compiling():
        steps = _steps(codec.derivative, codec.num_bits)
        if len(steps) <= MAX_COMPARISONS:
            codes = torch.full_like(cells, steps[0][1])
            for cell, code in steps[1:]:
                codes = torch.where(cells >= cell, float(code), codes)
            return codes
    table = _table(codec.derivative, codec.num_bits, cells.device).cell_codes
    index = cells.nan_to_num_(nan=0.0).clamp_(0, _CELLS - 1).to(torch.int32)
    return table.index_select(0, index.view(-1)).view(cells.shape)


def _levels(codec: DerivativeCodec, codes: Tensor) -> Tensor:
    """Levels, float32, of codes."""
    if torch.compiler.is_compiling() and 2**codec.num_bits <= MAX_COMPARISONS:
        first, *others = _level_list(codec.derivative, codec.num_bits)
        levels = torch.full_like(codes, first, dtype=torch.float32)
        for code, level in enumerate(others, start=1):
            levels = torch.where(codes >= code, level, levels)
        return levels
    table = _table(codec.derivative, codec.num_bits, codes.device).levels
    return table.index_select(0, codes.view(-1).to(torch.int32)).view(codes.shape)


@dataclass(frozen=True)
class ExactDerivativeCodec:
    """Keeps the input itself and evaluates the derivative in backward: the identity codec of these operators."""

    derivative: Derivative
    unit: int = 1

    def encode(self, values: Tensor) -> Kept:
        return (values,)

    def decode(self, kept: Kept, numel: int, dtype: torch.dtype) -> Tensor:
        return self.derivative(kept[0].to(dtype))
