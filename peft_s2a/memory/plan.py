"""A plan: what each way of fine-tuning a model needs, which fits a budget, and which of those is the fastest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .batch_size import UNLIMITED, PeakByBatch
from .budget import format_bytes, parse_bytes

SAME_SPEED = 1.05
"""Configurations whose FLOPs differ by less than this count as equally fast; the one listed first is taken."""


@dataclass(frozen=True)
class PlanRow:
    """One candidate; bytes at the planned batch size.

    Attributes:
        name: what it is.
        trainable: trained parameters.
        weights, gradients, optimizer, kept, temporaries, peak: see `SimulatedStep`. The peak is the whole of what is
            live at one moment; the parts have theirs at different moments.
        smallest_peak: the peak with a batch of one.
        largest_batch: the largest batch that fits the budget; 0: none does.
        fits: whether the planned batch does.
        relative_flops: FLOPs of forward and backward in units of full fine-tuning. Codes cost time, but no FLOPs.
        config: the PEFT configuration, if it is one.
        adaptive: whether it is a configuration of S2A.
        by_batch: the peak as a function of the batch size.
    """

    name: str
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    kept: int
    temporaries: int
    peak: int
    smallest_peak: int
    largest_batch: int
    fits: bool
    relative_flops: float
    config: Any = field(default=None, repr=False)
    adaptive: bool = False
    by_batch: PeakByBatch | None = field(default=None, repr=False, compare=False)


COLUMNS = ("weights", "gradients", "optimizer", "kept", "temporaries", "peak")
HEADER = ("", *COLUMNS, "largest batch", "fits", "relative FLOPs")


@dataclass(frozen=True)
class Plan:
    """What fits. `print(plan)` shows the table, `plan.as_dict()` is data, `plan.plot(path)` draws it.

    Attributes:
        model: name of the model.
        batch_size: planned batch size.
        budget: bytes.
        rows: the candidates, in their order.
        left_out: candidates that do not exist for the model, with the reason.
    """

    model: str
    batch_size: int
    budget: int
    rows: tuple[PlanRow, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def recommended(self) -> PlanRow | None:
        """The fastest row that fits; None if none does."""
        return fastest([row for row in self.rows if row.fits])

    @property
    def config(self) -> Any:
        """Configuration of the fastest S2A row that fits; None if none does."""
        row = fastest([row for row in self.rows if row.fits and row.adaptive])
        return None if row is None else row.config

    def with_budget(self, budget: str | int) -> Plan:
        """The same rows against another budget; nothing is simulated again.

        Raises:
            ValueError: if `budget` is not a size.
        """
        size = parse_bytes(budget)
        rows = [
            replace(
                row,
                fits=row.peak <= size,
                largest_batch=row.largest_batch if row.by_batch is None else row.by_batch.largest_batch(size),
            )
            for row in self.rows
        ]
        return replace(self, budget=size, rows=tuple(rows))

    def cells(self) -> list[list[str]]:
        """The table as text: a row under `HEADER` for each candidate."""
        return [
            [
                row.name,
                *(format_bytes(getattr(row, column)) for column in COLUMNS),
                "any" if row.largest_batch >= UNLIMITED else str(row.largest_batch),
                "yes" if row.fits else "no",
                f"{row.relative_flops:.2f}",
            ]
            for row in self.rows
        ]

    def title(self) -> str:
        """What was asked."""
        return f"{self.model}, batch of {self.batch_size}, budget {format_bytes(self.budget)}"

    def summary(self) -> list[str]:
        """What follows from the rows."""
        best = self.recommended
        if best is not None:
            lines = [f"recommended: {best.name}, {format_bytes(best.peak)}"]
        else:
            least = min(self.rows, key=lambda row: row.smallest_peak)
            most = max(self.rows, key=lambda row: row.largest_batch)
            smallest = f"the smallest peak, one image with {least.name}, is {format_bytes(least.smallest_peak)}"
            lines = [
                f"nothing fits: the largest batch that does is {most.largest_batch} with {most.name}"
                if most.largest_batch
                else f"nothing fits: {smallest}"
            ]
        return [*lines, *(f"{name}: {reason}" for name, reason in self.left_out)]

    def __str__(self) -> str:
        table = [list(HEADER), *self.cells()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in table
        ]
        return "\n".join([self.title(), *lines, *self.summary()])

    def as_dict(self) -> dict[str, Any]:
        """The plan in types that `json` can write; sizes in bytes."""
        best = self.recommended
        rows = [
            {name: value for name, value in vars(row).items() if name not in ("config", "adaptive", "by_batch")}
            for row in self.rows
        ]
        return {
            "model": self.model,
            "batch_size": self.batch_size,
            "budget": self.budget,
            "recommended": None if best is None else best.name,
            "rows": rows,
            "left_out": [list(item) for item in self.left_out],
        }

    def plot(self, path: str | Path) -> None:
        """Draws the peak of each row, and what it is made of, against the budget; `path`'s suffix is the format.

        Raises:
            ImportError: without matplotlib, which `peft-s2a[examples]` installs.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 0.6 * len(self.rows) + 1.6), layout="constrained")
        axes = figure.subplots()
        names = [row.name for row in self.rows]
        fixed = [(row.weights + row.optimizer) / 1e9 for row in self.rows]
        rest = [row.peak / 1e9 - low for row, low in zip(self.rows, fixed, strict=True)]
        axes.barh(names, fixed, color="tab:blue", label="weights and optimizer")
        axes.barh(names, rest, left=fixed, color="tab:orange", label="activations, gradients, temporaries")
        axes.axvline(self.budget / 1e9, color="tab:red", label=f"budget {format_bytes(self.budget)}")
        axes.invert_yaxis()
        axes.set(xlabel="peak, GB", title=self.title())
        axes.legend()
        figure.savefig(path)


def fastest(rows: Sequence[PlanRow]) -> PlanRow | None:
    """The first row whose FLOPs are within `SAME_SPEED` of the fewest."""
    if not rows:
        return None
    fewest = min(row.relative_flops for row in rows)
    return next(row for row in rows if row.relative_flops <= SAME_SPEED * fewest)
