"""How far the gradient moves when operators keep their activations in few bits.

The forward is exact whatever is kept, so the gradient is the exact one plus what the codes of each operator add to it.
These parts have little to do with each other: their squares add up. So a group's error at some number of bits is
measured with everything else exact, image by image and relative to the image's gradient. The errors of single
operators, of which there are many, are measured at one number of bits only: at others they follow the curve of all
operators of their kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..settings import BIT_LEVELS

ERROR_AT = 4
"""Bits at which the errors of single operators are measured."""

CURVE_IMAGES = 2
"""Images for the curve of a kind, where single operators are measured."""

SMALL = 1 / 512
"""Operators with a smaller share of all elements kept are not measured alone, but with the small ones of their kind."""

Bits = Mapping[str, int]
"""Bits by kind or by operator; everything else is exact."""
MeasureError = Callable[[Bits, "int | None"], float]
"""Relative error of the gradient with these bits: root mean square over the first images, or all of them."""


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
class Operator:
    """An operator that keeps something: its name, kind and elements for each image; or several small ones."""

    name: str
    kind: str
    elements: int
    members: tuple[str, ...]


def kind_sensitivities(operators: Sequence[Operator], error: MeasureError) -> list[Sensitivity]:
    """Each kind of operator, at every number of bits."""
    sizes = {kind: sum(o.elements for o in operators if o.kind == kind) for kind in _kinds(operators)}
    return [Sensitivity(kind, kind, size, _curve(error, kind, None)) for kind, size in sizes.items()]


def instance_sensitivities(operators: Sequence[Operator], error: MeasureError) -> list[Sensitivity]:
    """Each large operator, and the small ones of each kind together, whose group has the name of the kind."""
    curves = {kind: _curve(error, kind, CURVE_IMAGES) for kind in _kinds(operators)}
    found = []
    for group in merged_small(operators):
        measured = error(dict.fromkeys(group.members, ERROR_AT), None)
        found.append(Sensitivity(group.name, group.kind, group.elements, along_curve(measured, curves[group.kind])))
    return found


def merged_small(operators: Sequence[Operator]) -> list[Operator]:
    """The operators, the small ones of each kind as one, behind the others, with the name of the kind."""
    least = SMALL * sum(operator.elements for operator in operators)
    small = [operator for operator in operators if operator.elements < least]
    rest = []
    for kind in _kinds(small):
        own = [operator for operator in small if operator.kind == kind]
        rest.append(Operator(kind, kind, sum(o.elements for o in own), tuple(o.name for o in own)))
    return [operator for operator in operators if operator.elements >= least] + rest


def along_curve(error: float, curve: Mapping[int, float], at: int = ERROR_AT) -> dict[int, float]:
    """Errors of one operator at each number of bits, from its error at one and the errors of its whole kind."""
    return {bits: error * value / curve[at] if curve[at] else 0.0 for bits, value in curve.items()}


def _kinds(operators: Sequence[Operator]) -> dict[str, None]:
    return dict.fromkeys(operator.kind for operator in operators)


def _curve(error: MeasureError, kind: str, images: int | None) -> dict[int, float]:
    """The kind's error at each number of bits at which it is finite; it does not rise with the bits."""
    curve: dict[int, float] = {}
    largest = 0.0
    for bits in sorted(BIT_LEVELS, reverse=True):
        found = error({kind: bits}, images)
        if not math.isfinite(found):
            break
        largest = max(largest, found)
        curve[bits] = largest
    return dict(sorted(curve.items()))
