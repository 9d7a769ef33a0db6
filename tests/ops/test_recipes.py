"""Recipes: tensors that are made again from smaller ones."""

from __future__ import annotations

import gc
import pickle
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from peft_s2a.ops.recipes import RecipeBook, flatten_recipe, rebuild


def recorded(book: RecipeBook, function: object, *args: object, **kwargs: object) -> Tensor:
    result = function(*args, **kwargs)  # type: ignore[operator]
    book.record(result, function, args, kwargs)  # type: ignore[arg-type]
    return result


def test_a_broadcast_sum_is_made_again() -> None:
    book = RecipeBook()
    rows, columns = torch.randn(8, 1), torch.randn(1, 8)
    total = recorded(book, torch.add, rows, columns, alpha=2)
    recipe = book.get(total)
    assert recipe is not None
    leaves, tree = flatten_recipe(recipe)
    assert [leaf is part for leaf, part in zip(leaves, (rows, columns), strict=True)] == [True, True]
    assert torch.equal(rebuild(tree, leaves), total)


def test_recipes_nest() -> None:
    book = RecipeBook()
    table, window = torch.randn(1, 4, 4), torch.randn(6, 1, 4, 4)
    total = recorded(book, torch.add, table, window.expand(6, 2, 4, 4))
    viewed = recorded(book, Tensor.view, total, 2, 3, 2, 4, 4)
    again = recorded(book, torch.add, viewed, 1.0)
    recipe = book.get(again)
    assert recipe is not None
    leaves, tree = flatten_recipe(recipe)
    assert sum(t.untyped_storage().nbytes() for t in leaves) == table.nbytes + window.nbytes
    assert torch.equal(rebuild(tree, leaves), again)


def test_what_does_not_grow_has_no_recipe() -> None:
    book = RecipeBook()
    a, b = torch.randn(8, 8), torch.randn(8, 8)
    assert book.get(recorded(book, torch.add, a, b)) is None
    assert book.get(recorded(book, Tensor.expand, torch.randn(1, 8), 4, 8)) is None  # a view


def test_what_needs_a_gradient_has_no_recipe() -> None:
    book = RecipeBook()
    rows, columns = torch.randn(8, 1, requires_grad=True), torch.randn(1, 8)
    assert book.get(recorded(book, torch.add, rows, columns)) is None
    with torch.no_grad():
        assert book.get(recorded(book, torch.add, rows, columns)) is None


def test_a_tensor_that_dies_takes_its_recipe_along() -> None:
    book = RecipeBook()
    total = recorded(book, torch.add, torch.randn(8, 1), torch.randn(1, 8))
    assert len(book._recipes) == 1
    del total
    gc.collect()
    assert len(book._recipes) == 0


def test_a_result_that_was_changed_in_place_has_no_recipe() -> None:
    book = RecipeBook()
    total = recorded(book, torch.add, torch.randn(8, 1), torch.randn(1, 8))
    total.masked_fill_(total > 0, -float("inf"))
    assert book.get(total) is None


@pytest.mark.parametrize("nested", [False, True])
def test_a_result_whose_parts_were_changed_in_place_has_no_recipe(nested: bool) -> None:
    book = RecipeBook()
    rows = torch.randn(8, 1)
    total = recorded(book, torch.add, rows, torch.randn(1, 8))
    if nested:
        total = recorded(book, torch.add, total, 1.0)
    rows.zero_()
    assert book.get(total) is None


def test_copies_start_empty() -> None:
    book = RecipeBook()
    total = recorded(book, torch.add, torch.randn(8, 1), torch.randn(1, 8))
    for copy in (deepcopy(book), pickle.loads(pickle.dumps(book))):
        assert copy.get(total) is None
    assert book.get(total) is not None
