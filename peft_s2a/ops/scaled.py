"""Remembers of a tensor that it is a function of `factor * source`, to recognise activations that are written out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class ScaledTensors:
    """For results still alive, their source and factor; a result that dies takes its entry along."""

    def __init__(self) -> None:
        self._entries = WeakTensorKeyDictionary()

    def __reduce__(self) -> tuple[type[ScaledTensors], tuple[()]]:
        return ScaledTensors, ()

    def record(self, result: Tensor, source: Tensor, factor: float) -> None:
        """Nothing is recorded while a graph is traced."""
        if not torch.compiler.is_compiling():
            self._entries[result] = (source, factor, result._version, source._version)

    def get(self, tensor: Tensor) -> tuple[Tensor, float] | None:
        """Source and factor; None if nothing is known of the tensor, or one was changed in place since."""
        if torch.compiler.is_compiling():
            return None
        entry = self._entries.get(tensor)
        if entry is not None:
            source, factor, *versions = entry
            if versions == [tensor._version, source._version]:
                return source, factor
        return None
