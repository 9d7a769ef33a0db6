"""The result: bits of each group of operators, as a table, a plot and plain data for the configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .choices import joint_choices
from .knapsack import choose_options
from .sensitivity import Rebuilding, Sensitivity


@dataclass(frozen=True)
class GroupBits:
    """What one group of operators got.

    Attributes:
        name: the operators' kind, or the name of a single one, `"module path:kind:number"`.
        kind: the operators' kind.
        elements: elements that it keeps for each image.
        bits: bits per element; 0: it keeps nothing and is rebuilt.
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
        rebuilt_share: multiplications that are made again over those that could be.
    """

    by: str
    target_bits: float
    groups: tuple[GroupBits, ...]
    rebuilt_share: float = 0.0

    @property
    def average_bits(self) -> float:
        """Bits kept over elements that are kept where nothing is rebuilt, over all groups."""
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
        return {
            "by": self.by,
            "target_bits": self.target_bits,
            "rebuilt_share": self.rebuilt_share,
            "groups": [asdict(g) for g in self.groups],
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Allocation:
        """The allocation again.

        Raises:
            ValueError: for something else than `as_dict` gives.
        """
        try:
            groups = tuple(GroupBits(**group) for group in content["groups"])
            share = float(content.get("rebuilt_share", 0.0))  # younger than the rest
            found = cls(str(content["by"]), float(content["target_bits"]), groups, share)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"This is no allocation of bits, but {content!r}; calibrate again.") from error
        if found.by not in GROUPINGS or not groups:
            raise ValueError(f"This is no allocation of bits by {' or '.join(GROUPINGS)}; calibrate again.")
        return found

    def __str__(self) -> str:
        rows = [("group", "elements", "bits", "error")]
        rows += [(g.name, f"{g.elements:,}", str(g.bits or "rebuilt"), f"{g.error:.4f}") for g in self.groups]
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
    sensitivities: Sequence[Sensitivity],
    by: str,
    target_bits: float,
    budget_bytes: int | None = None,
    rebuildings: Sequence[Rebuilding] = (),
    rebuild_share: float = 1.0,
) -> Allocation:
    """The bits with the least total squared error of the gradient, optimal by dynamic programming (`knapsack`).

    Args:
        sensitivities: groups that keep something, with their error at each number of bits.
        by: what the groups are.
        target_bits: the average over all elements kept where nothing is rebuilt, at most.
        budget_bytes: in its place, bytes kept for each image in the groups' codes, without scales.
        rebuildings: groups that may be rebuilt and keep nothing.
        rebuild_share: multiplications that may be made again over those of all `rebuildings`.

    Raises:
        ValueError: if the budget is below what the fewest bits take.
    """
    elements = sum(s.elements for s in sensitivities)
    budget = math.floor(target_bits * elements) if budget_bytes is None else 8 * budget_bytes
    work = sum(r.work for r in rebuildings)
    allowed = math.floor(rebuild_share * work)
    joint = joint_choices(sensitivities, rebuildings)
    limit = None if allowed >= work else allowed
    joint = [[choice for choice in choices if limit is None or choice.work <= limit] for choices in joint]
    options = [[choice.option for choice in choices] for choices in joint]
    least = sum(min(option.size for option in group if limit is None or not option.work) for group in options)
    if budget < least:
        asked = f"{target_bits} bits on average" if budget_bytes is None else f"{budget_bytes:,} bytes for each image"
        raise ValueError(
            f"{asked} are less than the operators keep in the fewest bits they can have: "
            f"{least / elements:.2f} bits on average, {-(-least // 8):,} bytes for each image."
        )
    bits: dict[str, int] = {}
    squares: dict[str, float] = {}
    again = 0
    for choices, index in zip(joint, choose_options(options, budget, work_budget=limit), strict=True):
        chosen = choices[index]
        bits |= chosen.bits
        squares |= chosen.squares
        again += chosen.work
    groups = (GroupBits(s.name, s.kind, s.elements, bits[s.name], math.sqrt(squares[s.name])) for s in sensitivities)
    return Allocation(by, budget / elements, tuple(groups), again / work if work else 0.0)
