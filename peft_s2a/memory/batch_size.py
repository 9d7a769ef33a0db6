"""The peak as a function of the batch size.

Two steps of one model with different batches make and free the same storages in the same order, and the size of each
is a constant plus a multiple of the batch. So is what is live after each event, and the peak is the largest of these
lines: exact between and beyond the two batches, also where another line becomes the largest.

Lines miss one thing: loops over pieces have temporaries of at most a piece, which a small batch does not fill. So a
peak that was simulated bounds the others: a smaller batch needs no more, and a larger one at most in proportion. Of the
planned batch it is always known; of one image where the planned batch does not fit.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .simulation import SimulatedStep

Simulate = Callable[[int], SimulatedStep]
"""Simulates a step with a batch of this size."""

ATTEMPTS = 3
APART = 1024
"""Distance of the two batches: codes come in rows of 1024 elements, so that both fill their last rows alike."""
UNLIMITED = 2**31
"""Stands for a batch that no budget limits: nothing grows with it."""


@dataclass(frozen=True)
class PeakByBatch:
    """`peak(b) = max_i (constant_i + slope_i b)`, bounded by what is known of single batches.

    Attributes:
        constant, slope: `(n,)` float64 tensors of bytes and bytes per image.
        known: batch sizes and their peaks in bytes.
        loaded: bytes of weights and optimizer state, which are part of every peak.
    """

    constant: Tensor
    slope: Tensor
    known: tuple[tuple[int, int], ...]
    loaded: int

    @classmethod
    def fit(cls, simulate: Simulate, batch_size: int, first: SimulatedStep) -> PeakByBatch:
        """From the step `first` of `batch_size`, and one or a few more.

        Where a larger batch runs through other kernels, two larger ones are taken. If they never agree on the order of
        events, the peaks themselves are put on one line.
        """
        small, step = batch_size, first
        for _ in range(ATTEMPTS):
            large = simulate(small + APART)
            agree = large.fingerprint == step.fingerprint
            ends = [_lines(each, first) for each in (step, large)]
            if agree:
                break
            small, step = small + APART, large
        if not agree:
            small -= APART
            ends = [end.max().reshape(1) for end in ends]
        slope = (ends[1] - ends[0]) / APART
        return cls(ends[0] - slope * small, slope, ((batch_size, first.peak),), first.weights + first.optimizer)

    def peak(self, batch_size: int) -> int:
        """Bytes that are live at most."""
        by_lines = int((self.constant + self.slope * batch_size).max())
        bounds = (
            self.loaded + math.ceil((peak - self.loaded) * max(batch_size / known, 1.0)) for known, peak in self.known
        )
        return min(by_lines, *bounds)

    def with_known(self, batch_size: int, peak: int) -> PeakByBatch:
        """The same, where the peak of one more batch is known."""
        return replace(self, known=(*self.known, (batch_size, peak)))

    def largest_batch(self, budget: int) -> int:
        """The largest batch whose peak is at most `budget` bytes; 0 if one image is too much."""
        return bisect.bisect_right(range(1, UNLIMITED + 1), budget, key=self.peak)


def _lines(step: SimulatedStep, first: SimulatedStep) -> Tensor:
    """What is live after each event, the loaded model, the batch and the optimizer's state included."""
    live = torch.tensor([*step.live_bytes, first.optimizer_peak], dtype=torch.float64)
    return live + (step.weights + step.batch + first.optimizer)
