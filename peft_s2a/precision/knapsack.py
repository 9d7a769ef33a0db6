"""The multiple-choice knapsack: one option of each group, the least total cost within a total size and a total work.

Solved by dynamic programming over sizes (Kellerer, Pferschy & Pisinger, "Knapsack Problems", 2004, chapter 11).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

MOST_UNITS = 1 << 14
"""Sizes are counted in at most so many units."""
MOST_WORK_UNITS = 1 << 7
"""And work, where it is limited, in at most so many."""
MOST_STATES = 1 << 18
"""Units of size times units of work."""


@dataclass(frozen=True)
class Option:
    """One choice of a group.

    Attributes:
        size: what it takes, a whole number of any unit (bits, bytes).
        cost: what it costs; costs of the groups add up.
        work: the work that it makes, a whole number of any unit.
    """

    size: int
    cost: float
    work: int = 0


def choose_options(
    groups: Sequence[Sequence[Option]], budget: int, most_units: int = MOST_UNITS, work_budget: int | None = None
) -> list[int]:
    """Index of the option of each group with the least total cost among those that fit both budgets.

    Sizes above the smallest of their group are counted in units. If their greatest common divisor makes at most
    `most_units` of them, the choice is optimal. Otherwise a unit is the rest of the budget over `most_units`, sizes are
    rounded up, and the choice, which still fits, costs no more than the best one for a budget smaller by
    `len(groups) + 1` units: a part of one is lost in each group and at the end. `size_unit` gives the unit. Work is
    counted in the same way, in at most `MOST_WORK_UNITS`; there are fewer units of size then.

    Args:
        groups: the options of each group, in any order.
        budget: the largest total size.
        most_units: bounds memory and time, both proportional to it and to the number of options.
        work_budget: the largest total work; None: any.

    Raises:
        ValueError: if a group has no option, or the smallest options together exceed a budget.
    """
    if any(not options for options in groups):
        raise ValueError("A group has no option to choose.")
    if any(not math.isfinite(option.cost) for options in groups for option in options):
        raise ValueError("The cost of an option is not a finite number.")
    work = [[0 if work_budget is None else option.work for option in options] for options in groups]
    efforts, most_work = _counted(work, work_budget or 0, MOST_WORK_UNITS, "work")
    most_units = min(most_units, MOST_STATES // (most_work + 1))
    sizes, most = _counted([[option.size for option in options] for options in groups], budget, most_units, "size")
    best = torch.zeros(most_work + 1, most + 1, dtype=torch.float64)  # least cost of the groups so far within each
    chosen = torch.zeros(len(groups), *best.shape, dtype=torch.int16)
    for row, options, taken, made in zip(chosen, groups, sizes, efforts, strict=True):
        new = torch.full_like(best, math.inf)
        for index, (option, size, effort) in enumerate(zip(options, taken, made, strict=True)):
            if size > most or effort > most_work:
                continue
            cost = best[: most_work + 1 - effort, : most + 1 - size] + option.cost
            within = new[effort:, size:]
            row[effort:, size:].masked_fill_(cost < within, index)
            torch.minimum(within, cost, out=within)
        best = new
    choice: list[int] = []
    place, reach = most, most_work
    for row, taken, made in zip(reversed(chosen), reversed(sizes), reversed(efforts), strict=True):
        choice.append(int(row[reach, place]))
        place -= taken[choice[-1]]
        reach -= made[choice[-1]]
    return choice[::-1]


def size_unit(groups: Sequence[Sequence[Option]], budget: int, most_units: int = MOST_UNITS) -> int:
    """The unit that `choose_options` counts sizes in, where work is not limited."""
    return _unit([[option.size for option in options] for options in groups], budget, most_units, "size")


def _unit(amounts: Sequence[Sequence[int]], budget: int, most_units: int, what: str) -> int:
    common = math.gcd(*(amount - min(group) for group in amounts for amount in group)) or 1
    least, most = sum(map(min, amounts)), sum(map(max, amounts))
    if budget < least:
        raise ValueError(f"The options of least {what} take {least} together, more than the budget of {budget}.")
    rest = min(budget, most) - least  # what is left to spend
    return common if rest // common <= most_units else -(-rest // most_units)


def _counted(amounts: Sequence[Sequence[int]], budget: int, most_units: int, what: str) -> tuple[list[list[int]], int]:
    """Units of each option above the least of its group, rounded up, and the most units that there are to spend."""
    unit = _unit(amounts, budget, most_units, what)
    units = [[-(-(amount - min(group)) // unit) for amount in group] for group in amounts]
    return units, min((budget - sum(map(min, amounts))) // unit, sum(map(max, units)))
