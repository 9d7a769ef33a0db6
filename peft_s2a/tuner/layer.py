"""The tuner layer that puts a bias delta on a frozen layer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ..structure import BiasSlot, adds_bias_last, bias_slots, call_with_bias_deltas, find_channel_dim, input_width
from ..structure.bias import merged_bias
from .config import S2AConfig
from .mixed_batch import check_length, items_of, mixed_names, rows_of_items


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
        self.in_features, self.out_features = input_width(base_layer), self.slots[-1].width
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
                delta = torch.zeros(slot.width) if config.init_weights else torch.randn(slot.width)
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
        names = mixed_names()
        if names is not None and not self.disable_adapters:
            return self.call_for_items(names, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return self.call_base_layer({}, *args, **kwargs)
        return self.call_base_layer(self.deltas(), *args, **kwargs)

    def call_for_items(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """Calls the base layer once, and adds to each item of the batch the delta of its adapter.

        Raises:
            ValueError: if an adapter is merged, or the layer's input does not have one row an item.
        """
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        check_length(len(args[0] if args else next(iter(kwargs.values()))), names)
        slot = self.slots[-1]
        leaf = getattr(self, slot.leaf)
        if not adds_bias_last(self.base_layer):
            return self._call_for_each(names, leaf, *args, **kwargs)
        output = self.call_base_layer({}, *args, **kwargs)
        rows = rows_of_items(leaf, names)
        if rows is None:
            return output
        shape = [len(names)] + [1] * (output.dim() - 1)
        shape[find_channel_dim(self.base_layer)] = slot.width
        return output + rows.to(output.dtype).view(shape)

    def _call_for_each(self, names: Sequence[str], leaf: nn.ParameterDict, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Calls the base layer once for each adapter, with the items that have it."""
        groups = [(name, items_of(name, names)) for name in dict.fromkeys(names)]

        def of_items(value: Any, items: list[int]) -> Any:
            by_item = isinstance(value, torch.Tensor) and value.dim() and len(value) == len(names)
            return value[items] if by_item else value

        outputs = [
            self.call_base_layer(
                {self.slots[-1]: leaf[name]} if name in leaf else {},
                *(of_items(value, items) for value in args),
                **{key: of_items(value, items) for key, value in kwargs.items()},
            )
            for name, items in groups
        ]
        order = torch.tensor([place for _, items in groups for place in items], device=outputs[0].device)
        return torch.cat(outputs)[order.argsort()]

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

    def call_for_items(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """Refused where an item has a delta: the input bias lies inside the layer's one kernel."""
        if any(name in self.s2a_bias for name in names):
            raise ValueError(
                "nn.MultiheadAttention does not support mixed adapter batches: run each adapter on its own batch, or "
                "leave the layer out with exclude_modules."
            )
        return super().call_for_items(names, *args, **kwargs)
