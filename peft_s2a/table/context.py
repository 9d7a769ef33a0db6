"""What handlers share: the table that they enter themselves into, and what they know of a forward pass.

A handler has the signature of the torch function behind a `Context`, and returns `NotImplemented` where its operator
does not apply: torch's own then runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, float64
from torch.utils.weak import WeakTensorKeyDictionary

from ..codecs.affine import ROW, GroupAffineCodec
from ..ops.lineage import LineageBook, Node
from ..ops.origin import Origin, origin_of
from ..ops.overwriting import Overwriting
from ..ops.recipes import RecipeBook
from ..ops.recompute import runs_again
from ..ops.scaled import ScaledTensors
from ..settings import ActivationSettings, rebuilt_kind
from .calls import OperatorCalls, instance_name

MIN_ELEMENTS = ROW
"""Smaller tensors are left to torch: their codes would take a whole row."""


@dataclass
class Context:
    """What handlers know: the settings of the active adapter, and how the tensors of this pass came about."""

    settings: ActivationSettings
    recipes: RecipeBook = field(default_factory=RecipeBook)
    scaled: ScaledTensors = field(default_factory=ScaledTensors)
    sigmoids: ScaledTensors = field(default_factory=ScaledTensors)
    rows: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    """Probabilities that are kept already, for the products that take them."""
    lineage: LineageBook = field(default_factory=LineageBook)
    overwriting: Overwriting = field(default_factory=Overwriting)
    calls: OperatorCalls = field(default_factory=OperatorCalls)
    kept: dict[str, int] | None = None
    """Elements kept by each instance of `block`, while they are counted."""
    origins: dict[str, Origin] = field(default_factory=dict)
    """Where the input of each instance that may be rebuilt comes from, as far as it was counted."""

    def __reduce__(self) -> tuple[type[Context], tuple[ActivationSettings]]:
        return Context, (self.settings,)  # what is remembered belongs to the tensors of one process

    def bits(self, kind: str) -> int | None:
        """Bits of the operator of this kind in the present call of a torch function."""
        instances = self.settings.instances
        if instances is None:
            return self._bits_of(kind)
        name = self.calls.name(kind)
        return self._bits_of(kind) if name is None else self._instance_bits(name, kind)

    def _bits_of(self, kind: str) -> int | None:
        return self.settings.bits_of(kind, again=runs_again())

    def name(self, kind: str) -> str:
        """Name of the operator of this kind in the present call; `""` where there are none."""
        return "" if self.settings.instances is None else self.calls.name(kind) or ""

    def _instance_bits(self, name: str, kind: str) -> int | None:
        instances = self.settings.instances or {}
        if name not in instances:
            return self._bits_of(kind)
        if instances[name] == 0:  # rebuilt, and kept all the same where its origin is not known
            return self._bits_of(kind) or 8
        return instances[name]

    def count(self, kind: str, numel: int) -> None:
        """Says how many elements the operator of this kind in the present call keeps, where they are counted."""
        name = None if self.kept is None else self.calls.name(kind)
        if self.kept is not None and name is not None:
            self.kept[name] = self.kept.get(name, 0) + numel
            self.calls.forget()

    def block_bits(self, path: str, numel: int) -> int | None:
        """Bits of the input of a recomputed block, of which `numel` elements are kept."""
        if self.settings.instances is None:
            return self.settings.bits.get("block")
        name = instance_name(path, "block")
        if self.kept is not None:
            self.kept[name] = self.kept.get(name, 0) + numel
        return self._instance_bits(name, "block")

    def affine(self, kind: str, group_size: int = 64, row: int = ROW) -> GroupAffineCodec:
        """Group-wise codes for a kind; in 8 bits, to be on the safe side, for one that is exact."""
        return GroupAffineCodec(self.bits(kind) or 8, group_size, self.settings.rounding, row, self.settings.backend)

    def rebuilds(self) -> bool:
        """Whether some operator is or may be rebuilt; while a graph is traced none is."""
        return self.settings.rebuilds and not torch.compiler.is_compiling()

    def origin(self, kind: str, tensor: Tensor) -> Node | None:
        """How `tensor` is made again in backward, if this operator is rebuilt and it is known.

        Args:
            kind: the operator's, or the part of an attention that `tensor` is.
        """
        node = self.lineage.get(tensor) if self.rebuilds() else None
        if node is None:
            return None
        name = None if self.settings.instances is None else self.calls.name(kind)
        if name is not None and self.kept is not None and rebuilt_kind(kind) in self.settings.optional:
            self.origins[name] = origin_of(node)
        if name is not None and name in (self.settings.instances or {}):
            return node if (self.settings.instances or {})[name] == 0 else None
        return node if rebuilt_kind(kind) in self.settings.rebuilt else None


Handler = Callable[..., Any]
TABLE: dict[Callable[..., Any], Handler] = {}


def replaces(*functions: Callable[..., Any]) -> Callable[[Handler], Handler]:
    """Enters the decorated handler into `TABLE` for each torch function."""

    def enter(handler: Handler) -> Handler:
        for function in functions:
            TABLE[function] = handler
        return handler

    return enter


def applies(context: Context, kind: str, *tensors: Tensor) -> bool:
    """Whether this kind of operator is coded, and the tensors are of a size and dtype to be."""
    return context.bits(kind) is not None and all(
        t.is_floating_point() and t.numel() >= MIN_ELEMENTS and t.dtype != float64 for t in tensors
    )
