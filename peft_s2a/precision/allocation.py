"""The result: bits of each group of operators, as a table, a plot and plain data for the configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .knapsack import Option, choose_options
from .sensitivity import Sensitivity


@dataclass(frozen=True)
class GroupBits:
    """What one group of operators got.

    Attributes:
        name: the operators' kind, or the name of a single one, `"module path:kind:number"`.
        kind: the operators' kind.
        elements: elements that it keeps for each image.
        bits: bits per element.
        error: expected relative error of the adapter's gradient that these bits alone cause.
    """

    name: str
    kind: str
    elements: int
    bits: int
    error: float


@dataclass(frozen=True)
class Allocation:
    """Bits by group; `print` shows a table.

    Attributes:
        by: `"kind"` or `"instance"`.
        target_bits: the average that was asked for.
        groups: what each group got, in the order in which they run first.
    """

    by: str
    target_bits: float
    groups: tuple[GroupBits, ...]

    @property
    def average_bits(self) -> float:
        """Bits kept over elements kept, over all groups."""
        return sum(g.bits * g.elements for g in self.groups) / sum(g.elements for g in self.groups)

    @property
    def error(self) -> float:
        """Expected relative error of the adapter's gradient: errors of groups add up in square."""
        return math.hypot(*(g.error for g in self.groups))

    @property
    def bits(self) -> dict[str, int]:
        """Bits by name of the group."""
        return {g.name: g.bits for g in self.groups}

    def as_dict(self) -> dict[str, Any]:
        """The allocation in types that `json` can write, for `S2AConfig.activation_allocation`."""
        return {"by": self.by, "target_bits": self.target_bits, "groups": [asdict(g) for g in self.groups]}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Allocation:
        """The allocation again.

        Raises:
            ValueError: for something else than `as_dict` gives.
        """
        try:
            groups = tuple(GroupBits(**group) for group in content["groups"])
            found = cls(str(content["by"]), float(content["target_bits"]), groups)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"This is no allocation of bits, but {content!r}; calibrate again.") from error
        if found.by not in GROUPINGS or not groups:
            raise ValueError(f"This is no allocation of bits by {' or '.join(GROUPINGS)}; calibrate again.")
        return found

    def __str__(self) -> str:
        rows = [("group", "elements", "bits", "error")]
        rows += [(g.name, f"{g.elements:,}", str(g.bits), f"{g.error:.4f}") for g in self.groups]
        rows.append(
            ("all", f"{sum(g.elements for g in self.groups):,}", f"{self.average_bits:.2f}", f"{self.error:.4f}")
        )
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(
            f"{row[0]:<{widths[0]}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
            for row in rows
        )

    def plot(self, path: str | Path) -> None:
        """Draws bits by module and operator; `path`'s suffix is the format.

        Raises:
            ImportError: without matplotlib, which `peft-s2a[examples]` installs.
        """
        from .drawing import draw  # matplotlib is optional

        draw(self, path)


GROUPINGS = ("kind", "instance")


def allocate(
    sensitivities: Sequence[Sensitivity], by: str, target_bits: float, budget_bytes: int | None = None
) -> Allocation:
    """The bits with the least total squared error of the gradient, optimal by dynamic programming (`knapsack`).

    Args:
        sensitivities: groups that keep something, with their error at each number of bits.
        by: what the groups are.
        target_bits: the average over all elements kept, at most.
        budget_bytes: in its place, bytes kept for each image in the groups' codes, without scales.

    Raises:
        ValueError: if the budget is below what the fewest bits take.
    """
    elements = sum(s.elements for s in sensitivities)
    budget = math.floor(target_bits * elements) if budget_bytes is None else 8 * budget_bytes
    options = [[Option(bits * s.elements, error**2) for bits, error in s.errors.items()] for s in sensitivities]
    least = sum(min(option.size for option in group) for group in options)
    if budget < least:
        asked = f"{target_bits} bits on average" if budget_bytes is None else f"{budget_bytes:,} bytes for each image"
        raise ValueError(
            f"{asked} are less than the operators keep in the fewest bits they can have: "
            f"{least / elements:.2f} bits on average, {-(-least // 8):,} bytes for each image."
        )
    groups = []
    for s, index in zip(sensitivities, choose_options(options, budget), strict=True):
        bits = list(s.errors)[index]
        groups.append(GroupBits(s.name, s.kind, s.elements, bits, s.errors[bits]))
    return Allocation(by, budget / elements, tuple(groups))
