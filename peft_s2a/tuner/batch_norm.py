"""Batch norms under an adapter: running statistics are frozen, or trained as a part of the adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import nn

from ..structure import BiasSlot, call_with_bias_deltas, can_stand_in, is_batch_norm, stand_in
from .config import S2AConfig
from .discovery import unwrap
from .layer import AttentionBiasLayer, BiasLayer
from .mixed_batch import mixed_names

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def hold_statistics(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook: the batch norm uses its running statistics and leaves them alone."""
    if module.training:
        module.training = False


class BatchNormLayer(BiasLayer):
    """A batch norm with a bias delta and, with `train_batch_norm`, running statistics for each adapter.

    Without statistics of its own the running statistics of the base layer are used and stay as they are, in training
    too. In training with statistics of its own the layer normalises by the batch, as torch does.
    """

    other_param_names: tuple[str, ...] = tuple(f"s2a_{name}" for name in STATISTICS)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        for name in self.other_param_names:
            setattr(self, name, BufferDict(persistent=True))
        self._unmerged_statistics: dict[str, torch.Tensor] = {}

    def add_statistics(self, adapter_name: str) -> None:
        """Gives the adapter its own copy of the running statistics."""
        for name in STATISTICS:
            statistic = getattr(self.base_layer, name)
            if statistic is not None:
                getattr(self, f"s2a_{name}")[adapter_name] = statistic.detach().clone()

    def _statistics(self) -> dict[str, tuple[BufferDict, str]]:
        """Where the statistics of the first active adapter that has some are."""
        if self.disable_adapters or self.merged or mixed_names() is not None:
            return {}
        for adapter in self.active_adapters:
            dicts = {name: getattr(self, f"s2a_{name}") for name in STATISTICS}
            found = {name: (values, adapter) for name, values in dicts.items() if adapter in values}
            if found:
                return found
        return {}

    def call_base_layer(self, deltas: Mapping[BiasSlot, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        base, statistics = self.base_layer, self._statistics()
        if can_stand_in(base):
            own_copy = stand_in(base)
            own_copy.training = self.training and bool(statistics)
            own_copy._buffers.update({name: values[adapter] for name, (values, adapter) in statistics.items()})
            return call_with_bias_deltas(own_copy, deltas, args, kwargs)
        was_training, own = base.training, dict(base._buffers)
        base.training = self.training and bool(statistics)
        for name, (values, adapter) in statistics.items():
            base._buffers[name] = values[adapter]
        try:
            return super().call_base_layer(deltas, *args, **kwargs)
        finally:
            base.training = was_training
            for name, (values, adapter) in statistics.items():
                values[adapter] = base._buffers[name]
                base._buffers[name] = own[name]

    def call_for_items(self, names: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """Refused where an adapter has running statistics of its own."""
        if any(name in self.s2a_running_mean or name in self.s2a_running_var for name in names):
            raise ValueError(
                "Adapters with train_batch_norm=True cannot be mixed in a batch: each normalises with its own running "
                "statistics. Run each adapter on its own batch."
            )
        return super().call_for_items(names, *args, **kwargs)

    def merge_statistics(self, adapter_name: str) -> None:
        for name in STATISTICS:
            values = getattr(self, f"s2a_{name}")
            if adapter_name in values:
                buffer = getattr(self.base_layer, name)
                self._unmerged_statistics.setdefault(name, buffer.clone())
                buffer.copy_(values[adapter_name])

    def unmerge_statistics(self) -> None:
        for name, statistic in self._unmerged_statistics.items():
            getattr(self.base_layer, name).copy_(statistic)
        self._unmerged_statistics.clear()


def make_bias_layer(layer: nn.Module) -> BiasLayer:
    """The tuner layer for a frozen layer."""
    if isinstance(layer, nn.MultiheadAttention):
        return AttentionBiasLayer(layer)
    return BatchNormLayer(layer) if is_batch_norm(layer) else BiasLayer(layer)


def free_batch_norms(model: nn.Module) -> Iterator[nn.Module]:
    """The batch norms of a model that no tuner layer wraps."""
    wrapped = {id(unwrap(module)) for module in model.modules() if isinstance(module, BatchNormLayer)}
    return (module for module in model.modules() if is_batch_norm(module) and id(module) not in wrapped)


def hold_batch_norms(model: nn.Module, trained: set[nn.Module]) -> None:
    """Freezes the running statistics of every batch norm without a tuner layer, except the trained ones."""
    release_batch_norms(model)
    for module in free_batch_norms(model):
        if module not in trained:
            module.register_forward_pre_hook(hold_statistics)


def takes_batch_statistics(model: nn.Module) -> bool:
    """Whether a batch norm in the model normalises with the statistics of the batch, in training."""
    for module in model.modules():
        if isinstance(module, BatchNormLayer) and (module._statistics() or module.base_layer.running_mean is None):
            return True
    held = hold_statistics
    return any(
        module.running_mean is None or (module.training and held not in module._forward_pre_hooks.values())
        for module in free_batch_norms(model)
    )


def release_batch_norms(model: nn.Module) -> None:
    """Undoes `hold_batch_norms`."""
    for module in model.modules():
        held = [key for key, hook in module._forward_pre_hooks.items() if hook is hold_statistics]
        for key in held:
            del module._forward_pre_hooks[key]
        if held:
            module.training = model.training


def wants_statistics(config: S2AConfig, name: str) -> bool:
    """Whether the adapter trains the running statistics of this module."""
    return bool(config.batch_norm_modules) and name in (config.batch_norm_modules or ())
