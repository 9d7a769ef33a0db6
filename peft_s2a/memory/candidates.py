"""Candidates of a plan: ways of fine-tuning, as data, and the row that a simulation makes of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .batch_size import PeakByBatch
from .plan import PlanRow
from .running import Batch
from .simulation import MakeOptimizer, simulate_step


@dataclass(frozen=True)
class Candidate:
    """A way of fine-tuning.

    Attributes:
        name: what the row is called.
        prepare: makes a model without data trainable in this way; it may change the model it is given.
        config: the PEFT configuration it stands for, if any.
        adaptive: whether it is a configuration of S2A.
    """

    name: str
    prepare: Callable[[nn.Module], nn.Module]
    config: Any = None
    adaptive: bool = False


class NotApplicableError(ValueError):
    """A candidate does not exist for a model; the message says why."""


@dataclass(frozen=True)
class Task:
    """What is planned for.

    Attributes:
        shape_model: the model without data; candidates get a copy each.
        batch: makes a batch of a size, for such a model.
        batch_size: the planned size.
        budget: bytes.
        optimizer: makes the optimizer.
    """

    shape_model: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    batch_size: int
    budget: int
    optimizer: MakeOptimizer | None

    def row(self, candidate: Candidate, full_flops: int | None = None) -> tuple[PlanRow, int]:
        """A candidate's row, and its FLOPs.

        Args:
            full_flops: FLOPs of full fine-tuning; None: this is it.

        Raises:
            NotApplicableError: if the candidate does not exist for the model.
            CannotSimulateError: if the model's forward needs data.
        """
        model = candidate.prepare(self.shape_model())
        step = simulate_step(model, self.batch(self.batch_size), self.optimizer)
        by_batch = PeakByBatch.fit(lambda size: simulate_step(model, self.batch(size)), self.batch_size, step)
        if step.peak > self.budget and self.batch_size > 1:  # then small batches matter
            by_batch = by_batch.with_known(1, simulate_step(model, self.batch(1), self.optimizer).peak)
        row = PlanRow(
            name=candidate.name,
            trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
            weights=step.weights,
            gradients=step.gradients,
            optimizer=step.optimizer,
            kept=step.kept,
            temporaries=step.temporaries,
            peak=step.peak,
            smallest_peak=by_batch.peak(1),
            largest_batch=by_batch.largest_batch(self.budget),
            fits=step.peak <= self.budget,
            relative_flops=round(step.flops / (full_flops or step.flops), 4),
            config=candidate.config,
            adaptive=candidate.adaptive,
            by_batch=by_batch,
        )
        return row, step.flops
