"""What groups of operators can choose together: bits of each, and which are rebuilt from a source that is kept.

What is rebuilt keeps nothing and has the error of its source, so a source and what hangs on it choose as one. Of their
common choices those are kept that no other one beats in size, work and error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from .knapsack import Option
from .sensitivity import Rebuilding, Sensitivity

REBUILT = 0
"""Bits of what is rebuilt."""


@dataclass(frozen=True)
class Choice:
    """Bits of some groups.

    Attributes:
        bits: by name of the group; `REBUILT` for those that are rebuilt.
        squares: squared errors by name of the group.
        size: bits kept.
        work: multiplications made again.
    """

    bits: Mapping[str, int]
    squares: Mapping[str, float]
    size: int
    work: int = 0

    @property
    def option(self) -> Option:
        return Option(self.size, sum(self.squares.values()), self.work)

    def __add__(self, other: Choice) -> Choice:
        """Both."""
        return Choice(
            {**self.bits, **other.bits},
            {**self.squares, **other.squares},
            self.size + other.size,
            self.work + other.work,
        )


def joint_choices(sensitivities: Sequence[Sensitivity], rebuildings: Sequence[Rebuilding]) -> list[list[Choice]]:
    """Choices of each set of groups that hang together, every group in one of them."""
    groups = {s.name: s for s in sensitivities}
    sources = dict.fromkeys(r.source for r in rebuildings)
    hanging = {name for r in rebuildings for name in (r.source, *r.members)}
    alone = [_kept(s) for name, s in groups.items() if name not in hanging]
    return alone + [_from_source(groups, name, [r for r in rebuildings if r.source == name]) for name in sources]


def _kept(group: Sensitivity) -> list[Choice]:
    name = group.name
    return [Choice({name: b}, {name: error**2}, b * group.elements) for b, error in group.errors.items()]


def _from_source(groups: Mapping[str, Sensitivity], source: str, hanging: Sequence[Rebuilding]) -> list[Choice]:
    kept = [_combined([_kept(groups[name]) for name in r.members]) for r in hanging]
    found: list[Choice] = []
    for own in _kept(groups[source]):
        bits = own.bits[source]
        ways = [[*k, _rebuilt(r, bits)] if bits in r.errors else k for r, k in zip(hanging, kept, strict=True)]
        found += _combined([[own], *ways])
    return _unbeaten(found)


def _rebuilt(rebuilding: Rebuilding, source_bits: int) -> Choice:
    members = rebuilding.members
    square = rebuilding.errors[source_bits] ** 2 / len(members)
    return Choice(
        dict.fromkeys(members, REBUILT), dict.fromkeys(members, square), rebuilding.kept_all_the_same, rebuilding.work
    )


def _combined(parts: Sequence[Sequence[Choice]]) -> list[Choice]:
    """One choice of each part."""
    return reduce(lambda some, more: _unbeaten(a + b for a in some for b in more), parts[1:], list(parts[0]))


def _unbeaten(choices: Iterable[Choice]) -> list[Choice]:
    """Those that no other one beats in all of size, work and error."""
    found: list[tuple[Option, Choice]] = []
    options = ((choice.option, choice) for choice in choices)
    for option, choice in sorted(options, key=lambda pair: (pair[0].size, pair[0].work, pair[0].cost)):
        if not any(other.work <= option.work and other.cost <= option.cost for other, _ in found):
            found.append((option, choice))
    return [choice for _, choice in found]
