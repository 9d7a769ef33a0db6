"""The tuner: puts S2A adapters into a model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
)
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..structure import BlockShape, is_supported
from . import attachments
from .batch_norm import BatchNormLayer, make_bias_layer, wants_statistics
from .block import attach, detach_all
from .config import S2AConfig
from .layer import BiasLayer, S2ALayer
from .matching import CHILD_NAME, in_chosen_layers, is_excluded, is_own, matches_names
from .mixed_batch import mixed_batch
from .planning import apply_budget
from .registration import PREFIX
from .resolve import resolve


class S2AModel(BaseTuner):
    """Makes an S2A model (arXiv 2503.08154) from a model and a configuration.

    Args:
        model: the model to adapt; its parameters are frozen and stay as they are.
        config: the configuration; it is copied, and names and shapes are filled in in the copy.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: whether to make the adapter without memory, for loading.
    """

    prefix: str = PREFIX
    tuner_layer_cls = S2ALayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (as PEFT declares it)

    _names_to_merge: list[str] | None = None

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Creates the adapter in the model; see `BaseTuner.inject_adapter`."""
        if not self.peft_config[adapter_name].inference_mode:  # loading takes the configuration that it is given
            self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        if state_dict is not None:
            # PEFT reads module names off the keys: what lies behind ".s2a_" is cut, and a block is not its child
            state_dict = {key.replace(f".{CHILD_NAME}.{PREFIX}", f".{PREFIX}"): v for key, v in state_dict.items()}
        super().inject_adapter(
            model,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            state_dict=state_dict,
        )
        config: Any = self.peft_config[adapter_name]
        attachments.install(model, adapter_name, config)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if not peft_config.inference_mode:
            apply_budget(peft_config, model)
        resolve(peft_config, model)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        if is_own(key):
            return False
        if is_excluded(peft_config, key):
            return _ExcludedModule()
        if not in_chosen_layers(peft_config, key):
            return False
        return (
            matches_names(peft_config.target_modules, key)
            or _is_block(peft_config, key)
            or wants_statistics(peft_config, key)
        )

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if _is_block(peft_config, current_key):
            shape = BlockShape.from_dict((peft_config.block_shapes or {})[current_key])
            adapter = attach(target, attachments.image_size(self.model))
            if not adapter.shapes:
                adapter._active_adapter = adapter_name
            adapter.update_layer(adapter_name, current_key, shape, peft_config)
        if not (matches_names(peft_config.target_modules, current_key) or wants_statistics(peft_config, current_key)):
            return
        if isinstance(target, NonDynamicallyQuantizableLinear):
            warnings.warn(
                f"{current_key} is left alone: nn.MultiheadAttention does not call it. Target the attention layer "
                f"{current_key.rpartition('.')[0]!r} itself.",
                UserWarning,
                stacklevel=2,
            )
            return
        if isinstance(target, BiasLayer):
            layer = target
        elif isinstance(target, BaseTunerLayer) or not is_supported(target):
            raise ValueError(
                f"Target module {current_key} ({type(target).__name__}) is not supported. Supported are linear layers, "
                "convolutions, layer, RMS, batch and group norms and nn.MultiheadAttention; blocks go into "
                "block_modules."
            )
        else:
            layer = make_bias_layer(target)
            layer.train(target.training)
            layer._active_adapter = adapter_name
            setattr(parent, target_name, layer)
        if isinstance(layer, BatchNormLayer) and wants_statistics(peft_config, current_key):
            layer.add_statistics(adapter_name)
        layer.update_layer(adapter_name, peft_config)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter; where it was the only active one, the first of those left becomes active."""
        was_active = adapter_name in self.active_adapters
        others = [name for name in self.active_adapters if name != adapter_name]
        super().delete_adapter(adapter_name)
        attachments.forget(self.model, adapter_name)
        if was_active and self.peft_config:  # layers choose by themselves, one that has no other adapter none
            others = others or [next(iter(self.peft_config))]
            self.set_adapter(others, inference_mode=any(self.peft_config[name].inference_mode for name in others))

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused; LoRA has it.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "add_weighted_adapter is not there for S2A: what side branches and heads compute is not linear in their "
            "weights, so that no mean of two adapters does what both do. To let several act at once, activate them "
            "together, model.base_model.set_adapter(['one', 'other']): deltas, prompts and side branches add up."
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names: Sequence[str] | None = kwargs.pop("adapter_names", None)
        with nullcontext() if names is None else mixed_batch(self, names, self.peft_config):
            yield

    def _check_merge_allowed(self) -> None:
        """Refuses a merge that some layer cannot do, before anything is touched.

        Raises:
            ValueError: if a prompt, a side branch or a layer without a bias stands in the way.
        """
        super()._check_merge_allowed()
        names = self._names_to_merge if self._names_to_merge is not None else self.active_adapters
        for adapter_name in names:
            for key, layer in self.model.named_modules():
                reason = layer.can_merge(adapter_name) if isinstance(layer, S2ALayer) else None
                if reason:
                    raise ValueError(
                        f"Adapter {adapter_name!r} cannot be merged at {key}: {reason}. Keep the adapter beside the "
                        "model, remove it with unload(), or train an adapter of bias deltas only (prompt_rank=0, "
                        "side_reduction=0, such layers in exclude_modules)."
                    )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges the bias deltas into the base model; see `BaseTuner.merge_adapter`."""
        self._names_to_merge = adapter_names
        try:
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        finally:
            self._names_to_merge = None

    def _warn_of_new_biases(self, adapter_names: list[str]) -> None:
        layers = [(key, layer) for key, layer in self.model.named_modules() if isinstance(layer, BiasLayer)]
        new = [key for key, layer in layers if any(layer.creates_bias(name) for name in adapter_names)]
        if new:
            warnings.warn(
                f"Merging gives {len(new)} layers a bias that they were made without, such as {new[0]}. A merged "
                "checkpoint needs a model that has these biases: from_pretrained of the base class drops them. Keep "
                "the adapter beside the model to save and load it.",
                UserWarning,
                stacklevel=4,
            )

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        self._names_to_merge = adapter_names
        if merge:
            self._warn_of_new_biases(adapter_names if adapter_names is not None else self.active_adapters)
        try:
            model: Any = super()._unload_and_optionally_merge(
                merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )
        finally:
            self._names_to_merge = None
        detach_all(model)
        attachments.remove(model)
        return model

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Maps the keys of a checkpoint to the model's.

        Raises:
            ValueError: if the checkpoint is of another architecture: keys missing or too many.
        """
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
        expected = set(_filter_state_dict_by_key_prefixes(model.state_dict(), prefixes))
        expected = {key for key in expected if key.endswith(f".{adapter_name}")}
        unexpected = sorted(key for key in set(remapped) - expected if f".{PREFIX}" in key)
        missing = sorted(expected - set(remapped))
        if unexpected or missing:
            parts = [
                f"{len(keys)} tensors {what}, such as {keys[0]!r}"
                for what, keys in (("that the model has no place for", unexpected), ("missing", missing))
                if keys
            ]
            raise ValueError(
                f"The S2A checkpoint does not fit the model: {'; '.join(parts)}. It was made for another architecture, "
                "or the file is incomplete."
            )
        return remapped


def _is_block(config: S2AConfig, key: str) -> bool:
    return key in (config.block_shapes or {}) and any(config.block_sizes(key))
