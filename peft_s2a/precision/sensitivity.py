"""How far the gradient moves when operators keep their activations in few bits.

The forward is exact whatever is kept, so the gradient is the exact one plus what the codes of each operator add to it.
These parts have little to do with each other: their squares add up. So a group's error at some number of bits is
measured with everything else exact, image by image and relative to the image's gradient. The errors of single
operators, of which there are many, are measured at one number of bits only: at others they follow the curve of all
operators of their kind.

What is rebuilt has the error of its source. That is measured together with the source's own, whose square is then taken
off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..settings import BIT_LEVELS, rebuilt_kind

ERROR_AT = 4
"""Bits at which the errors of single operators are measured."""

CURVE_BITS = (8, 4, 3, 2, 1)
"""Bits at which the errors of a whole kind are measured; those in between are found between them."""

SMALL = 1 / 512
"""Operators with a smaller share of all elements kept are not measured alone, but with the small ones of their kind."""

Bits = Mapping[str, int]
"""Bits by kind or by operator; everything else is exact."""
MeasureError = Callable[[Bits], float]
"""Relative error of the gradient with these bits: root mean square over the images."""


@dataclass(frozen=True)
class Sensitivity:
    """One group of operators.

    Attributes:
        name: of the group.
        kind: of its operators.
        elements: elements that it keeps for each image.
        errors: relative error of the adapter's gradient by number of bits.
    """

    name: str
    kind: str
    elements: int
    errors: Mapping[int, float]


@dataclass(frozen=True)
class Rebuilding:
    """Groups that can keep nothing, and be rebuilt from another one.

    Attributes:
        source: the group that they are rebuilt from.
        members: their names.
        errors: what that adds to the source's own error, by number of bits of the source.
        work: multiplications for each image.
        kept_all_the_same: bits kept for each image by members whose origin is not known.
    """

    source: str
    members: tuple[str, ...]
    errors: Mapping[int, float]
    work: int
    kept_all_the_same: int = 0


@dataclass(frozen=True)
class Operator:
    """An operator that keeps something, or a group of them.

    Attributes:
        name: of the operator or group.
        kind: the operators' kind.
        elements: kept for each image.
        parts: the single operators of a group; an operator has none.
        sources: names of the norms that the operator could be rebuilt from.
        work: multiplications for each image that this would take.
    """

    name: str
    kind: str
    elements: int
    parts: tuple[Operator, ...] = ()
    sources: frozenset[str] = frozenset()
    work: int = 0

    @property
    def singles(self) -> tuple[Operator, ...]:
        """The single operators."""
        return self.parts or (self,)


def kind_groups(operators: Sequence[Operator]) -> list[Operator]:
    """The operators of each kind as one."""
    return [_merged(kind, [o for o in operators if o.kind == kind]) for kind in _kinds(operators)]


def instance_groups(operators: Sequence[Operator]) -> list[Operator]:
    """The operators, the small ones of each kind as one, behind the others, with the name of the kind."""
    least = SMALL * sum(operator.elements for operator in operators)
    small = [operator for operator in operators if operator.elements < least]
    return [operator for operator in operators if operator.elements >= least] + kind_groups(small)


def _merged(kind: str, operators: Sequence[Operator]) -> Operator:
    return Operator(kind, kind, sum(o.elements for o in operators), tuple(operators))


@dataclass(frozen=True)
class Dependants:
    """Groups of one kind, or the parts of attentions, that hang on one source."""

    kind: str
    source: Operator
    members: tuple[Operator, ...]


def find_dependants(groups: Sequence[Operator]) -> list[Dependants]:
    """Which groups can be rebuilt from one source alone, those that are rebuilt together as one."""
    home = {single.name: group for group in groups for single in group.singles}
    found: dict[tuple[str, str], list[Operator]] = {}
    for group in groups:
        sources = {home[name].name for single in group.singles for name in single.sources if name in home}
        if len(sources) == 1:
            found.setdefault((rebuilt_kind(group.kind), sources.pop()), []).append(group)
    by_name = {group.name: group for group in groups}
    return [Dependants(kind, by_name[source], tuple(members)) for (kind, source), members in found.items()]


def measure(
    groups: Sequence[Operator], error: MeasureError, fallback: Callable[[str], int | None]
) -> tuple[list[Sensitivity], list[Rebuilding]]:
    """Errors of each group at every number of bits, and of those that can be rebuilt.

    Args:
        groups: each is measured at `ERROR_AT` bits; its errors at others follow the curve of its kind.
        error: measures.
        fallback: bits, by kind, of what is kept although its group is rebuilt.
    """
    kinds = kind_groups([single for group in groups for single in group.singles])
    curves = {kind.name: _curve(error, lambda bits, kind=kind: _bits(kind, bits)) for kind in kinds}  # type: ignore[misc]
    found = []
    for group in groups:
        measured = error(_bits(group, ERROR_AT))
        found.append(Sensitivity(group.name, group.kind, group.elements, along_curve(measured, curves[group.kind])))
    return found, _rebuildings(groups, kinds, found, error, fallback)


def _bits(group: Operator, bits: int) -> dict[str, int]:
    return {single.name: bits for single in group.singles}


def _rebuildings(
    groups: Sequence[Operator],
    kinds: Sequence[Operator],
    own: Sequence[Sensitivity],
    error: MeasureError,
    fallback: Callable[[str], int | None],
) -> list[Rebuilding]:
    known = {s.name: s.errors for s in own}
    curves: dict[str, dict[int, float]] = {}
    for every in find_dependants(kinds):
        joint = _curve(error, lambda bits, every=every: _bits_from_source(every, bits))  # type: ignore[misc]
        alone = _curve(error, lambda bits, every=every: _bits(every.source, bits))  # type: ignore[misc]
        curves[every.kind] = {bits: _without(value, alone.get(bits, 0.0)) for bits, value in joint.items()}
    found = []
    for some in find_dependants(groups):
        both = error(_bits_from_source(some, ERROR_AT))
        added = _without(both, known[some.source.name].get(ERROR_AT, 0.0))
        singles = [single for member in some.members for single in member.singles]
        found.append(
            Rebuilding(
                source=some.source.name,
                members=tuple(member.name for member in some.members),
                errors=along_curve(added, curves[some.kind]),
                work=sum(single.work for single in singles),
                kept_all_the_same=sum(s.elements * (fallback(s.kind) or 0) for s in singles if not s.sources),
            )
        )
    return found


def _bits_from_source(dependants: Dependants, bits: int) -> dict[str, int]:
    again = {single.name: 0 for member in dependants.members for single in member.singles}
    return _bits(dependants.source, bits) | again


def _without(both: float, one: float) -> float:
    """What is added to one error where both together are known: squares add up."""
    return math.sqrt(max(both**2 - one**2, 0.0))


def along_curve(error: float, curve: Mapping[int, float], at: int = ERROR_AT) -> dict[int, float]:
    """Errors of one operator at each number of bits, from its error at one and the errors of its whole kind."""
    return {bits: error * value / curve[at] if curve.get(at) else 0.0 for bits, value in curve.items()}


def _kinds(operators: Sequence[Operator]) -> dict[str, None]:
    return dict.fromkeys(operator.kind for operator in operators)


def _curve(error: MeasureError, at: Callable[[int], Bits]) -> dict[int, float]:
    """The error at each number of bits at which it is finite; it does not rise with the bits."""
    curve: dict[int, float] = {}
    largest = 0.0
    for bits in CURVE_BITS:
        found = error(at(bits))
        if not math.isfinite(found):
            break
        largest = max(largest, found)
        curve[bits] = largest
    for bits in BIT_LEVELS:
        below = max((b for b in curve if b < bits), default=None)
        above = min((b for b in curve if b > bits), default=None)
        if bits not in curve and below is not None and above is not None:
            curve[bits] = curve[below] ** ((above - bits) / (above - below)) * curve[above] ** (
                (bits - below) / (above - below)
            )
    return dict(sorted(curve.items()))
