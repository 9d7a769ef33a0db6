"""The tuner layer that puts a bias delta on a frozen layer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ..structure import BiasSlot, bias_slots, call_with_bias_deltas
from ..structure.bias import merged_bias
from .config import S2AConfig


class S2ALayer(BaseTunerLayer):
    """What the bias layers and the adapters of blocks have in common."""

    merged_adapters: list[str]

    def can_merge(self, adapter_name: str) -> str | None:
        """Why this adapter cannot be merged here; `None` if it can."""
        raise NotImplementedError


class BiasLayer(nn.Module, S2ALayer):
    """A linear, convolution, norm or attention layer with a bias delta for each adapter.

    The base layer is called as it is, with its bias replaced by bias + deltas while it runs.

    Args:
        base_layer: the frozen layer.
    """

    adapter_layer_names: tuple[str, ...] = ("s2a_bias",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.slots = bias_slots(base_layer)
        for slot in self.slots:
            setattr(self, slot.leaf, nn.ParameterDict())
        self.merged_adapters = []
        self._disable_adapters = False
        self._unmerged: dict[BiasSlot, nn.Parameter | torch.Tensor | None] = {}

    def __getattr__(self, name: str) -> Any:
        """Attributes that are not here are the base layer's: model code may look at them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def update_layer(self, adapter_name: str, config: S2AConfig) -> None:
        """Adds the adapter, or makes it anew."""
        if config.use_bias:
            for slot in self.slots:
                delta = torch.zeros(slot.width) if config.init_weights else torch.randn(slot.width) * 0.02
                getattr(self, slot.leaf)[adapter_name] = nn.Parameter(delta)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def deltas(self) -> dict[BiasSlot, torch.Tensor]:
        """For each slot the sum of the active adapters' deltas, shape (channels); slots without one are left out."""
        sums: dict[BiasSlot, torch.Tensor] = {}
        for slot in self.slots:
            leaf = getattr(self, slot.leaf)
            for name in self.active_adapters:
                if name in leaf:
                    sums[slot] = sums[slot] + leaf[name] if slot in sums else leaf[name]
        return sums

    def call_base_layer(self, deltas: Mapping[BiasSlot, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """Calls the base layer with these deltas on its biases."""
        return call_with_bias_deltas(self.base_layer, deltas, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.call_base_layer({}, *args, **kwargs)
        return self.call_base_layer(self.deltas(), *args, **kwargs)

    def can_merge(self, adapter_name: str) -> str | None:
        blocked = [slot for slot in self.slots if not slot.in_place and adapter_name in getattr(self, slot.leaf)]
        if not blocked:
            return None
        return f"{type(self.base_layer).__name__} has no bias that its forward would add"

    def creates_bias(self, adapter_name: str) -> bool:
        """Whether merging this adapter gives the base layer a bias that it does not have."""
        return any(
            adapter_name in getattr(self, slot.leaf)
            and getattr(self.base_layer.get_submodule(slot.owner), slot.name, None) is None
            for slot in self.slots
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the deltas to the base layer's biases; a layer without one gets one until `unmerge`.

        Args:
            safe_merge: whether to refuse a result that is not finite.

        Raises:
            ValueError: if the layer cannot hold a bias, or `safe_merge` finds a number that is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            reason = self.can_merge(name)
            if reason:
                raise ValueError(f"Adapter {name!r} cannot be merged: {reason}.")
            merged = {
                slot: merged_bias(self.base_layer, slot, getattr(self, slot.leaf)[name].data)
                for slot in self.slots
                if name in getattr(self, slot.leaf)
            }
            if safe_merge and not all(torch.isfinite(bias).all() for bias in merged.values()):
                raise ValueError(f"The merged bias of adapter {name!r} is not finite: the adapter seems to be broken.")
            for slot, bias in merged.items():
                self._write_bias(slot, bias)
            self.merge_statistics(name)
            self.merged_adapters.append(name)

    def _write_bias(self, slot: BiasSlot, bias: torch.Tensor) -> None:
        owner = self.base_layer.get_submodule(slot.owner)
        current = getattr(owner, slot.name)
        if slot not in self._unmerged:
            self._unmerged[slot] = None if current is None else current.detach().clone()
        if current is None:
            setattr(owner, slot.name, nn.Parameter(bias.detach().clone(), requires_grad=False))
        else:
            current.data.copy_(bias)

    def merge_statistics(self, adapter_name: str) -> None:
        """Moves what else the adapter trains into the base layer."""

    def unmerge_statistics(self) -> None:
        """Puts back what `merge_statistics` replaced."""

    def unmerge(self) -> None:
        """Puts the base layer's own biases back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for slot, bias in self._unmerged.items():
            owner = self.base_layer.get_submodule(slot.owner)
            if bias is None:
                setattr(owner, slot.name, None)
            else:
                getattr(owner, slot.name).data.copy_(bias)
        self._unmerged.clear()
        self.unmerge_statistics()
        self.merged_adapters.clear()


class AttentionBiasLayer(BiasLayer):
    """`nn.MultiheadAttention` with a delta on its input bias (query, key, value) and on its output bias."""

    adapter_layer_names = ("s2a_bias_in", "s2a_bias")
