"""The multiple-choice knapsack: one option of each group, the least total cost within a total size.

Solved by dynamic programming over sizes (Kellerer, Pferschy & Pisinger, "Knapsack Problems", 2004, chapter 11).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

MOST_UNITS = 1 << 14
"""Sizes are counted in at most so many units."""


@dataclass(frozen=True)
class Option:
    """One choice of a group.

    Attributes:
        size: what it takes, a whole number of any unit (bits, bytes).
        cost: what it costs; costs of the groups add up.
    """

    size: int
    cost: float


def choose_options(groups: Sequence[Sequence[Option]], budget: int, most_units: int = MOST_UNITS) -> list[int]:
    """Index of the option of each group with the least total cost among those that fit the budget.

    Sizes above the smallest of their group are counted in units. If their greatest common divisor makes at most
    `most_units` of them, the choice is optimal. Otherwise a unit is the rest of the budget over `most_units`, sizes are
    rounded up, and the choice, which still fits, costs no more than the best one for a budget smaller by
    `len(groups) + 1` units: a part of one is lost in each group and at the end. `size_unit` gives the unit.

    Args:
        groups: the options of each group, in any order.
        budget: the largest total size.
        most_units: bounds memory and time, both proportional to it and to the number of options.

    Raises:
        ValueError: if a group has no option, or the smallest options together exceed the budget.
    """
    if any(not options for options in groups):
        raise ValueError("A group has no option to choose.")
    if any(not math.isfinite(option.cost) for options in groups for option in options):
        raise ValueError("The cost of an option is not a finite number.")
    unit = size_unit(groups, budget, most_units)
    sizes = [_units(options, unit) for options in groups]
    units = min((budget - sum(map(_least, groups))) // unit, sum(map(max, sizes)))
    best = torch.zeros(units + 1, dtype=torch.float64)  # least cost of the groups so far within each size
    chosen = torch.zeros(len(groups), units + 1, dtype=torch.int16)
    for row, options, taken in zip(chosen, groups, sizes, strict=True):
        new = torch.full_like(best, math.inf)
        for index, (option, size) in enumerate(zip(options, taken, strict=True)):
            if size > units:
                continue
            cost = best[: units + 1 - size] + option.cost
            better = cost < new[size:]
            new[size:][better] = cost[better]
            row[size:][better] = index
        best = new
    choice: list[int] = []
    place = units
    for row, taken in zip(reversed(chosen), reversed(sizes), strict=True):
        choice.append(int(row[place]))
        place -= taken[choice[-1]]
    return choice[::-1]


def size_unit(groups: Sequence[Sequence[Option]], budget: int, most_units: int = MOST_UNITS) -> int:
    """The unit that `choose_options` counts sizes in."""
    common = math.gcd(*(option.size - _least(options) for options in groups for option in options)) or 1
    rest = _rest(groups, budget)
    return common if rest // common <= most_units else -(-rest // most_units)


def _rest(groups: Sequence[Sequence[Option]], budget: int) -> int:
    """What is left to spend above the smallest options, no more than the largest ones take."""
    least = sum(map(_least, groups))
    if budget < least:
        raise ValueError(f"The smallest options take {least} together, more than the budget of {budget}.")
    most = sum(max(option.size for option in options) for options in groups)
    return min(budget, most) - least


def _least(options: Sequence[Option]) -> int:
    return min(option.size for option in options)


def _units(options: Sequence[Option], unit: int) -> list[int]:
    """Units of each option above the smallest, rounded up."""
    return [-(-(option.size - _least(options)) // unit) for option in options]
