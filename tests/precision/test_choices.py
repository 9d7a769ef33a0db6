"""What hangs together chooses together: against trying everything."""

from __future__ import annotations

import itertools
import math

import pytest

from peft_s2a.precision import allocate
from peft_s2a.precision.choices import joint_choices
from peft_s2a.precision.sensitivity import Operator, Rebuilding, Sensitivity, find_dependants, instance_groups

LEVELS = (2, 4, 8)


def group(name: str, elements: int, error: float) -> Sensitivity:
    return Sensitivity(name, name.partition(":")[0], elements, {bits: error * 2.0**-bits for bits in LEVELS})


GROUPS = [group("source", 3, 1.0), group("query", 2, 6.0), group("key", 3, 5.0), group("gelu", 8, 2.0)]
GROUPS.append(group("linear", 1, 3.0))
REBUILDINGS = [
    Rebuilding("source", ("query", "key"), {bits: 4.0 * 2.0**-bits for bits in LEVELS}, work=3),
    Rebuilding("source", ("gelu",), {bits: 7.0 * 2.0**-bits for bits in LEVELS}, work=4, kept_all_the_same=2),
]


def best_square(budget: float, work: float) -> float:
    """The least squared error within bits and work, by trying everything."""
    best = math.inf
    for bits in itertools.product(LEVELS, repeat=len(GROUPS)):
        for again in itertools.product((False, True), repeat=len(REBUILDINGS)):
            taken = dict(zip((g.name for g in GROUPS), bits, strict=True))
            size = square = effort = 0.0
            for r, chosen in zip(REBUILDINGS, again, strict=True):
                if chosen:
                    square += r.errors[taken["source"]] ** 2
                    size += r.kept_all_the_same
                    effort += r.work
            left_out = {name for r, chosen in zip(REBUILDINGS, again, strict=True) if chosen for name in r.members}
            for g in GROUPS:
                if g.name not in left_out:
                    size += taken[g.name] * g.elements
                    square += g.errors[taken[g.name]] ** 2
            if size <= budget and effort <= work:
                best = min(best, square)
    return best


@pytest.mark.parametrize("share", [0.0, 0.5, 4 / 7, 1.0])
@pytest.mark.parametrize("target", [2, 2.5, 4, 6])
def test_it_is_the_best_of_all(target, share):
    elements = sum(g.elements for g in GROUPS)
    found = allocate(GROUPS, "kind", target, rebuildings=REBUILDINGS, rebuild_share=share)
    assert found.error**2 == pytest.approx(best_square(target * elements, share * 7))
    assert found.rebuilt_share <= share
    assert found.average_bits <= target
    rebuilt = {name for name, bits in found.bits.items() if bits == 0}
    assert rebuilt in [set(), {"query", "key"}, {"gelu"}, {"query", "key", "gelu"}]
    assert rebuilt or not share or target > 4
    assert ("rebuilt" in str(found)) == bool(rebuilt)
    assert type(found).from_dict(found.as_dict()) == found


def test_every_group_is_in_one_set_of_choices():
    names = [set().union(*(choice.bits for choice in choices)) for choices in joint_choices(GROUPS, REBUILDINGS)]
    assert sorted(name for some in names for name in some) == sorted(g.name for g in GROUPS)
    assert len(names) == 2


def test_fewer_bits_than_one_each_where_something_is_rebuilt():
    assert allocate(GROUPS, "kind", 1, rebuildings=REBUILDINGS).rebuilt_share == 1
    with pytest.raises(ValueError, match="fewest bits"):
        allocate(GROUPS, "kind", 1, rebuildings=REBUILDINGS, rebuild_share=0.5)


def operator(name: str, elements: int, *sources: str) -> Operator:
    return Operator(name, name.split(":")[1], elements, (), frozenset(sources), 5 if sources else 0)


def test_what_hangs_on_one_source_is_rebuilt_with_it():
    operators = [
        operator("a:source:0", 1000),
        operator("b:source:0", 1000),
        operator("a:query:0", 1000, "a:source:0"),
        operator("a:value:0", 1000, "a:source:0"),
        operator("a:gelu:0", 4000, "b:source:0"),
        operator("c:query:0", 1000, "a:source:0", "b:source:0"),
        operator("c:gelu:0", 4000),
    ]
    found = {
        (d.kind, d.source.name, tuple(m.name for m in d.members)) for d in find_dependants(instance_groups(operators))
    }
    assert found == {
        ("attention", "a:source:0", ("a:query:0", "a:value:0")),
        ("gelu", "b:source:0", ("a:gelu:0",)),
    }


def test_a_group_of_small_ones_has_one_source_or_none():
    operators = [
        operator("a:source:0", 5000),
        operator("b:source:0", 5000),
        operator("a:gelu:0", 1, "a:source:0"),
        operator("b:gelu:0", 1, "b:source:0"),
    ]
    assert find_dependants(instance_groups(operators)) == []
    (only,) = find_dependants(instance_groups(operators[:3]))
    assert (only.source.name, only.members[0].name) == ("a:source:0", "gelu")
