"""Derivative codes: the index of a level of a piecewise-constant derivative, without any scale.

Backward of `y = h(x)` needs `h'(x)` alone. The inputs are cut into 1024 cells; the cells are clustered by their value
of h' so that the expected squared error under a reference density is least. In one dimension optimal clusters are
intervals of the values, so dynamic programming finds them exactly; each level is its cluster's mean, so the error has
zero mean. Encoding is one table lookup by cell, decoding one by code.
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

from .base import Kept
from .packing import pack, unpack

Derivative = Callable[[Tensor], Tensor]

ROW = 1024
_CELLS = 1024
_RANGE = 8.0
"""Cells cover [-8, 8); what lies outside belongs to the first and the last cell."""


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


def optimal_clusters(values: Tensor, weights: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Clusters of numbers with the least weighted squared error, by dynamic programming (exact).

    Args:
        values, weights: `(n,)`, any order.

    Returns:
        Cluster of each value, `(n,)` int64, and the clusters' means `(num_clusters,)`. Clusters that cannot be filled
        (fewer distinct values) repeat the last mean.
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
    return labels, means


@functools.cache
def level_table(derivative: Derivative, num_bits: int) -> LevelTable:
    """The table of one derivative; computed once in a process, wherever that is (50 ms at 4 bits, 0.5 s at 8)."""
    with unset_fake_temporarily(), torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        edges = torch.linspace(-_RANGE, _RANGE, _CELLS + 1, dtype=torch.double)
        centres = (edges[1:] + edges[:-1]) / 2
        weights = reference_density(centres)
        labels, means = optimal_clusters(derivative(centres), weights, 2**num_bits)
        return LevelTable(labels.to(torch.uint8), means.float())


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
    name = f"{derivative!r} {num_bits} {device}"
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

    @property
    def unit(self) -> int:
        return ROW

    def encode(self, values: Tensor) -> Kept:
        cell_codes = _table(self.derivative, self.num_bits, values.device).cell_codes
        rows = math.ceil(values.numel() / ROW)
        padding = rows * ROW - values.numel()
        if padding:
            values = torch.nn.functional.pad(values, (0, padding))
        values = values.float()
        if _finite_at_infinity(self.derivative):
            values = values.clamp(-_RANGE, _RANGE)
        # zero before it is summed: a sum of huge numbers would overflow
        poison = (values * 0).view(rows, ROW).sum(1).to(torch.bfloat16)
        cells = values * (_CELLS / (2 * _RANGE)) + _CELLS / 2
        index = cells.nan_to_num_(nan=0.0).clamp_(0, _CELLS - 1).to(torch.int32)
        codes = cell_codes.index_select(0, index.view(-1))
        return pack(codes.view(rows, ROW), self.num_bits), poison

    def decode(self, kept: Kept, numel: int, dtype: torch.dtype) -> Tensor:
        packed, poison = kept
        table = _table(self.derivative, self.num_bits, packed.device).levels
        codes = unpack(packed, self.num_bits, ROW).view(-1).to(torch.int32)
        levels = table.index_select(0, codes).view(-1, ROW)
        return (levels + poison.float().unsqueeze(1)).view(-1)[:numel].to(dtype)


@dataclass(frozen=True)
class ExactDerivativeCodec:
    """Keeps the input itself and evaluates the derivative in backward: the identity codec of these operators."""

    derivative: Derivative
    unit: int = 1

    def encode(self, values: Tensor) -> Kept:
        return (values,)

    def decode(self, kept: Kept, numel: int, dtype: torch.dtype) -> Tensor:
        return self.derivative(kept[0].to(dtype))
