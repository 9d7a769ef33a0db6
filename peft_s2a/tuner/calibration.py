"""`activation_bits="auto"`: measures how sensitive the adapter's gradient is, and shares the bits out."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils._pytree import tree_map

from ..interception import ActivationInterceptor
from ..memory.running import tensors_in
from ..precision import (
    Allocation,
    Arguments,
    ErrorProbe,
    GradientProbe,
    Loss,
    Operator,
    Rebuilding,
    Sensitivity,
    agreed,
    allocate,
    first_items,
    instance_groups,
    kind_groups,
    measure,
    quiet_training,
    single_items,
)
from ..settings import ATTENTION_PARTS, OPERATOR_KINDS, ActivationSettings
from .config import AUTO, S2AConfig, check_share, check_target
from .layer import S2ALayer

CALIBRATIONS = "_s2a_calibrations"
IMAGES = 2
"""Images that are calibrated with, unless there are fewer: more change hardly any bits (docs/precision.md)."""
ALL_KINDS = (*OPERATOR_KINDS, *ATTENTION_PARTS)
_PARTS = frozenset(ATTENTION_PARTS)
EXACT: dict[str, int | None] = dict.fromkeys(ALL_KINDS)


class Calibration:
    """Calibrates one adapter: when asked to, or in its first training forward.

    Args:
        model: the base model.
        adapter_name: the adapter.
        config: its configuration, in which the result is stored.
        interceptor: the model's.
    """

    def __init__(
        self, model: nn.Module, adapter_name: str, config: S2AConfig, interceptor: ActivationInterceptor
    ) -> None:
        self.model, self.adapter_name, self.config, self.interceptor = model, adapter_name, config, interceptor
        self._busy = False
        self._handle: Any = None

    def wait(self) -> None:
        """Hooks the first training forward, before all hooks that it has by now, if there is something to do."""
        self.stop_waiting()
        if self.config.activation_bits == AUTO and self.config.activation_allocation is None:
            self._handle = self.model.register_forward_pre_hook(self.before_forward, prepend=True, with_kwargs=True)

    def stop_waiting(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: calibrates on the first images of the batch that comes."""
        if self._busy or not model.training or not torch.is_grad_enabled():
            return
        if self.config.activation_bits != AUTO or self.config.activation_allocation is not None:
            return
        if self.interceptor.active_adapter == self.adapter_name:
            self._calibrate_on(args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _calibrate_on(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = tensors_in((args, kwargs))
        simulated = any(isinstance(t, FakeTensor) or t.is_meta for t in (*given, *self.model.parameters()))
        items = [Arguments(a, k) for a, k in single_items((args, kwargs), IMAGES)]
        if simulated or not items or not any(p.requires_grad for p in self._parameters()):
            return
        self.apply(self.measure_and_allocate(self.model, items))

    def measure_and_allocate(
        self, model: nn.Module, items: Sequence[Any], loss: Loss | None = None, seed: int = 0, **budget: Any
    ) -> Allocation:
        """The allocation for these images, the same in every process; see `calibrate`."""

        def compute() -> dict[str, Any]:
            found, again = self.sensitivities(model, items, loss, seed)
            return self.allocate(found, again, **budget).as_dict()

        return Allocation.from_dict(agreed(compute, next(self.model.parameters()).device))

    def allocate(
        self,
        sensitivities: Sequence[Sensitivity],
        rebuildings: Sequence[Rebuilding],
        target_bits: float | None = None,
        budget_bytes: int | None = None,
        rebuild_share: float | None = None,
    ) -> Allocation:
        """The best allocation under the budgets given here, or else the configuration's."""
        config = self.config
        target = config.activation_target_bits if target_bits is None else target_bits
        share = config.activation_rebuild_share if rebuild_share is None else rebuild_share
        return allocate(sensitivities, config.activation_groups, target, budget_bytes, rebuildings, share)

    def apply(self, allocation: Allocation) -> None:
        """Stores the allocation in the configuration and trains with it from now on."""
        self.config.activation_bits = AUTO
        self.config.activation_allocation = allocation.as_dict()
        self.interceptor.set_adapter_settings(self.adapter_name, self.config.activation_settings())
        self.stop_waiting()

    def sensitivities(
        self, model: nn.Module, items: Sequence[Any], loss: Loss | None = None, seed: int = 0
    ) -> tuple[list[Sensitivity], list[Rebuilding]]:
        """Errors of the adapter's gradient by group of operators and bits, and of those that are rebuilt.

        Args:
            model: what is called; the base model or one around it.
            items: arguments of the model, one image each.

        Raises:
            ValueError: if a loss is not finite, nothing is trained or nothing is coded.
        """
        parameters = [p for p in self._parameters() if p.requires_grad]
        if not parameters:
            raise ValueError(f"Adapter {self.adapter_name!r} has no trainable parameter to calibrate with.")
        probe = GradientProbe(model, parameters, items, loss, seed)
        settings = self.config.settings_before_calibration()
        grouped = kind_groups if self.config.activation_groups == "kind" else instance_groups
        with self._exclusively(), quiet_training(model):
            operators = self._operators(probe, settings)
            if not operators:
                raise ValueError(
                    "No operator of the model keeps activations in codes, so there are no bits to share out: use "
                    "activation_bits=None or a number."
                )

            self.interceptor.set_adapter_settings(self.adapter_name, _measured(settings, {}, operators))
            errors = ErrorProbe(probe)

            @functools.cache
            def measured(*bits: tuple[str, int]) -> float:
                self.interceptor.set_adapter_settings(self.adapter_name, _measured(settings, dict(bits), operators))
                return errors()

            return measure(grouped(operators), lambda bits: measured(*bits.items()), settings.bits_of)

    def _parameters(self) -> Iterator[nn.Parameter]:
        for module in self.model.modules():
            if isinstance(module, S2ALayer):
                leaves: list[Any] = [getattr(module, name) for name in module.adapter_layer_names]
                yield from (leaf[self.adapter_name] for leaf in leaves if self.adapter_name in leaf)

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        """No other calibration inside; outside, the settings are what they were."""
        settings = self.interceptor.adapter_settings(self.adapter_name)
        self._busy = True
        try:
            yield
        finally:
            self._busy = False
            self.interceptor.set_adapter_settings(self.adapter_name, settings)

    def _operators(self, probe: GradientProbe, settings: ActivationSettings) -> list[Operator]:
        """The operators that keep codes, in the order in which they run, and how many elements for one image."""
        widest = replace(settings, bits=dict.fromkeys(ALL_KINDS, 8), instances={})
        self.interceptor.set_adapter_settings(self.adapter_name, widest)
        with self.interceptor.counting(self.adapter_name) as (kept, origins, current):
            alive: dict[int, Tensor] = {}  # held, so that no address is used twice

            def count(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()._cdata
                if tensor.dtype == torch.uint8 and current() and storage not in alive:
                    alive[storage] = tensor
                    kept[current()] = kept.get(current(), 0) + tensor.nbytes  # 8 bits: a byte for each element
                return tensor

            with saved_tensors_hooks(count, lambda tensor: tensor):
                probe(0)  # with backward, which frees what the graph keeps
            alive.clear()
        found = []
        for name, elements in kept.items():
            if elements:
                origin = origins.get(name)
                made_from = (origin.sources, origin.work) if origin else (frozenset[str](), 0)
                found.append(Operator(name, name.rsplit(":", 2)[1], elements, (), *made_from))
        return found


def _measured(
    settings: ActivationSettings, bits: Mapping[str, int], operators: Sequence[Operator]
) -> ActivationSettings:
    """Settings with these bits by kind or operator, and everything else exact, products too."""
    kinds = EXACT | {name: 8 for name in bits if ":" not in name}
    if settings.rebuilt and any("source" in name.split(":") for name in bits):
        # what is made again from a source has its error, and keeps nothing itself
        kept = {operator.kind for operator in operators}
        again = [kind for kind in settings.rebuilt if kind not in kept and not (kind == "attention" and kept & _PARTS)]
        kinds |= dict.fromkeys([*again, *(ATTENTION_PARTS if "attention" in again else ())], 8)
    return replace(settings, bits=kinds, precision="highest").allocated(bits)


def calibrate(
    model: nn.Module,
    dataloader: Iterable[Any],
    adapter_name: str | None = None,
    images: int = IMAGES,
    loss: Loss | None = None,
    seed: int = 0,
    target_bits: float | None = None,
    budget_bytes: int | None = None,
    rebuild_share: float | None = None,
) -> Allocation:
    """Shares bits out among the operators by what their errors do to the adapter's gradient.

    The gradient of a few images, one at a time, is taken exactly and then with one group of operators in each number of
    bits; total squared error is minimised under the budget. Afterwards the model is as before, but for the bits that
    the adapter trains with from then on; they are stored in its configuration and saved with it. In a distributed run
    every process calls this and gets the result of the first.

    Args:
        model: a model with an S2A adapter whose configuration has `activation_bits="auto"`.
        dataloader: batches: mappings (`**batch`), pairs of images and class numbers, tensors, or positional arguments.
        adapter_name: the adapter; None: the active one.
        images: how many are taken from the front of the dataloader.
        loss: `loss(model, batch)` for a batch of one image; None: the loss in the model's output, or cross-entropy with
            the labels of a pair, or, where there is neither, the output along random numbers.
        seed: of random numbers (dropout, the dataloader's order); the same seed gives the same result.
        target_bits: average bits per kept element; None: the configuration's `activation_target_bits`.
        budget_bytes: in its place, bytes of codes for each image, without scales and what is kept exactly.
        rebuild_share: with `activation_policy="auto"`, the share of what could be rebuilt that may be, in
            multiplications; None: the configuration's `activation_rebuild_share`.

    Raises:
        ValueError: if there is no such adapter, it has other bits than `"auto"`, the dataloader is empty, a loss is not
            finite, no operator is coded, or the budget is out of range.
    """
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        model = model.module
    calibration = _calibration_of(model, adapter_name)
    if calibration.config.activation_bits != AUTO:
        raise ValueError(
            f"activation_bits={calibration.config.activation_bits!r} says already how many bits there are; make the "
            'adapter with activation_bits="auto" to have them calibrated.'
        )
    if isinstance(images, bool) or not isinstance(images, int) or images < 1:
        raise ValueError(f"images={images!r} must be a positive whole number.")
    if target_bits is not None:
        check_target(target_bits)
    if rebuild_share is not None:
        check_share(rebuild_share)
    device = next(model.parameters()).device
    items = [_moved(item, device) for item in first_items(dataloader, images, seed)]
    allocation = calibration.measure_and_allocate(
        model, items, loss, seed, target_bits=target_bits, budget_bytes=budget_bytes, rebuild_share=rebuild_share
    )
    calibration.apply(allocation)
    return allocation


def _calibration_of(model: nn.Module, adapter_name: str | None) -> Calibration:
    found: dict[str, Calibration] = {}
    for module in model.modules():
        found = vars(module).get(CALIBRATIONS) or found
    if not found:
        raise ValueError("The model has no S2A adapter: make one with get_peft_model(model, S2AConfig(...)).")
    name = adapter_name or next(iter(found.values())).interceptor.active_adapter
    if name not in found:
        raise ValueError(f"The model has no S2A adapter {name!r}; it has {', '.join(map(repr, found))}.")
    return found[name]


def _moved(batch: Any, device: torch.device) -> Any:
    return tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, batch)


def calibrations(model: nn.Module) -> dict[str, Calibration]:
    """The base model's calibrations by adapter, made at the first call."""
    found: dict[str, Calibration] = vars(model).setdefault(CALIBRATIONS, {})
    return found
