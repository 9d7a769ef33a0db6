"""How a tensor without gradient came about from smaller ones, so that those are kept in its place.

Attention masks and relative-position biases are broadcast over windows and batch before attention sees them: the sum
is many times larger than what it was made of. A recipe remembers the calls, as a tree whose leaves are tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

GROWS = 1.5
"""A result this many times larger than what it was made of is worth a recipe."""


@dataclass(frozen=True)
class Recipe:
    """`function(*args, **kwargs)`; tensors among the arguments may have recipes of their own."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class _Leaf:
    index: int


def _storage_bytes(tensors: Sequence[Tensor]) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor)]


class RecipeBook:
    """Recipes of the tensors of one forward pass; a tensor that dies takes its recipe along."""

    def __init__(self) -> None:
        # recipe of a result, and the versions of the result and of the recipe's leaves when it was made
        self._recipes = WeakTensorKeyDictionary()

    def __reduce__(self) -> tuple[type[RecipeBook], tuple[()]]:
        # copies and pickles of a model start without recipes: they belong to tensors of this process
        return RecipeBook, ()

    def get(self, tensor: Tensor) -> Recipe | None:
        """The recipe of `tensor`, unless it or what it was made of has been changed in place since."""
        recipe, versions = self._recipes.get(tensor, (None, None))
        return recipe if recipe is not None and _versions(tensor, recipe) == versions else None

    def record(
        self, result: Tensor, function: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Remembers `result = function(*args, **kwargs)` if its parts are much smaller; none of them has a gradient."""
        inputs = _tensors(args) + _tensors(tuple(kwargs.values()))
        if any(t.requires_grad or t.is_inference() for t in (result, *inputs)):
            return
        if any(isinstance(a, (tuple, list)) and _tensors(a) for a in args):
            return  # an index of several tensors: its parts would be kept outside the graph
        leaves, _ = flatten_recipe(self._expand(Recipe(function, args, kwargs)))
        if result.untyped_storage().nbytes() >= GROWS * _storage_bytes(leaves):
            recipe = self._expand(Recipe(function, args, kwargs))
            self._recipes[result] = recipe, _versions(result, recipe)

    def _expand(self, recipe: Recipe) -> Recipe:
        """Puts the recipes of the arguments in their places."""
        args = tuple(self.get(a) or a if isinstance(a, Tensor) else a for a in recipe.args)
        return Recipe(recipe.function, args, recipe.kwargs)


def flatten_recipe(recipe: Recipe) -> tuple[list[Tensor], Recipe]:
    """The tensors at the leaves, and the tree with their numbers in their places."""
    leaves: list[Tensor] = []
    return leaves, _strip(recipe, leaves)


# no recursive closures here: each would be a reference cycle that holds tensors until the garbage is collected


def _strip(value: Any, leaves: list[Tensor]) -> Any:
    if isinstance(value, Recipe):
        args = tuple(_strip(a, leaves) for a in value.args)
        return Recipe(value.function, args, {k: _strip(v, leaves) for k, v in value.kwargs.items()})
    if isinstance(value, Tensor):
        leaves.append(value)
        return _Leaf(len(leaves) - 1)
    return value


def _versions(result: Tensor, recipe: Recipe) -> tuple[int, ...]:
    return tuple(t._version for t in (result, *flatten_recipe(recipe)[0]))


def rebuild(tree: Recipe, leaves: Sequence[Tensor]) -> Tensor:
    """The tensor again, from the leaves of `flatten_recipe`."""

    with torch.no_grad():
        value: Tensor = _value_of(tree, leaves)
        return value


def _value_of(node: Any, leaves: Sequence[Tensor]) -> Any:
    if isinstance(node, Recipe):
        args = [_value_of(a, leaves) for a in node.args]
        return node.function(*args, **{k: _value_of(v, leaves) for k, v in node.kwargs.items()})
    return leaves[node.index] if isinstance(node, _Leaf) else node
