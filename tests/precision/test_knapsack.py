"""The knapsack against trying everything."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_s2a.precision.knapsack import Option, choose_options, size_unit

OPTION = st.builds(Option, st.integers(0, 60), st.integers(0, 1000).map(float), st.integers(0, 9))
OPTIONS = st.lists(OPTION, min_size=1, max_size=4)
GROUPS = st.lists(OPTIONS, min_size=1, max_size=4)


def total(groups: list[list[Option]], choice: list[int], field: str) -> float:
    return sum(getattr(options[index], field) for options, index in zip(groups, choice, strict=True))


def best_cost(groups: list[list[Option]], budget: int, work: int | None = None) -> float | None:
    """The least cost that fits, by trying everything."""
    costs = [
        sum(option.cost for option in found)
        for found in itertools.product(*groups)
        if sum(option.size for option in found) <= budget
        and (work is None or sum(option.work for option in found) <= work)
    ]
    return min(costs, default=None)


@settings(max_examples=150, deadline=None)
@given(GROUPS, st.integers(0, 200))
def test_it_is_the_best_of_all(groups, budget):
    expected = best_cost(groups, budget)
    if expected is None:
        with pytest.raises(ValueError, match="more than the budget"):
            choose_options(groups, budget)
        return
    choice = choose_options(groups, budget)
    assert total(groups, choice, "size") <= budget
    assert total(groups, choice, "cost") == expected


@settings(max_examples=150, deadline=None)
@given(GROUPS, st.integers(0, 200), st.integers(0, 30))
def test_it_is_the_best_of_all_within_a_limit_of_work(groups, budget, work):
    groups = [[Option(0, 2000.0), *group] for group in groups]  # so that there is a choice
    choice = choose_options(groups, budget, work_budget=work)
    assert total(groups, choice, "size") <= budget
    assert total(groups, choice, "work") <= work
    assert total(groups, choice, "cost") == best_cost(groups, budget, work)


@settings(max_examples=100, deadline=None)
@given(GROUPS, st.integers(0, 200))
def test_with_few_units_it_fits_and_keeps_its_bound(groups, budget):
    if best_cost(groups, budget) is None:
        return
    choice = choose_options(groups, budget, most_units=10)
    bound = best_cost(groups, budget - (len(groups) + 1) * size_unit(groups, budget, 10))
    assert total(groups, choice, "size") <= budget
    assert bound is None or total(groups, choice, "cost") <= bound


def test_large_sizes_with_a_common_divisor_are_exact():
    groups = [
        [Option(b * n << 20, 4.0**-b * c) for b in (1, 2, 3, 4, 6, 8)] for n, c in ((1, 5), (3, 2), (4, 9), (2, 1))
    ]
    budget = 30 << 20
    assert size_unit(groups, budget) == 1 << 20
    assert total(groups, choose_options(groups, budget), "cost") == best_cost(groups, budget)


@pytest.mark.parametrize(
    ("groups", "message"),
    [([[]], "no option"), ([[Option(1, float("nan"))]], "finite"), ([[Option(1, float("inf"))]], "finite")],
)
def test_what_cannot_be_solved(groups, message):
    with pytest.raises(ValueError, match=message):
        choose_options(groups, 10)
