"""From torch functions to operators: a function mode that reaches every model alike, functional calls included."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .ops.leftovers import LeftoverHooks
from .settings import ActivationSettings
from .table import FORWARD_ONLY, GROWING, METADATA, RULES, TABLE, Context, record_lineage


def _needs_grad(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(isinstance(a, Tensor) and a.requires_grad for a in args) or any(
        isinstance(a, Tensor) and a.requires_grad for a in kwargs.values()
    )


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for arg in (*args, *kwargs.values()):
        for part in arg if isinstance(arg, (tuple, list)) else (arg,):
            if isinstance(part, Tensor):
                yield part


def _linear_arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
    return input, weight, bias


def _without_override_check(function: types.FunctionType) -> Callable[..., Any]:
    """The Python body of a torch function, whose calls are seen by the mode although the function itself is not."""
    checks = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    namespace = function.__globals__ | dict.fromkeys(checks, lambda *_: False)
    copy = types.FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_COMPOSITES: dict[Callable[..., Any], Callable[..., Any]] = {
    function: _without_override_check(function)  # type: ignore[arg-type]
    for function in (
        F.multi_head_attention_forward,
        F.softmin,
        F.gumbel_softmax,
        F.lp_pool1d,
        F.lp_pool2d,
        F.lp_pool3d,
        F.local_response_norm,
    )
}
"""Torch functions made of others, whose parts are to be replaced one by one."""


class ActivationMode(TorchFunctionMode):
    """Runs the operators of `TABLE` in place of torch's functions where a gradient is needed."""

    def __init__(self, settings: ActivationSettings) -> None:
        super().__init__()
        self.context = Context(settings)
        self.leftovers = LeftoverHooks()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return self._call(func, args, kwargs)
        tensors = list(_tensors(args, kwargs))
        looks = tensors and func not in METADATA
        overwriting = self.context.overwriting
        if looks:
            overwriting.restore(tensors)
        result = self._call(func, args, kwargs)
        if looks:
            overwriting.withdraw(tensors)
        if func is F.linear:
            overwriting.offer(result, *_linear_arguments(*args, **kwargs))
        if self.context.rebuilds() and tensors:
            record_lineage(self.context, result, func, args, kwargs)
        return result

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.context.settings.instances is not None:
            self.context.calls.begin()
        handler = TABLE.get(func)
        if handler is not None and (_needs_grad(args, kwargs) if torch.is_grad_enabled() else func in FORWARD_ONLY):
            result = handler(self.context, *args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in _COMPOSITES:
            with self:
                return _COMPOSITES[func](*args, **kwargs)
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        rule = RULES.get(func)
        codecs = None if rule is None or not torch.is_grad_enabled() else rule(self.context, *args, **kwargs)
        with nullcontext() if codecs is None else self.leftovers.coding(codecs, _tensors(args, kwargs)):
            result = func(*args, **kwargs)
        if func in GROWING:
            self.context.recipes.record(result, func, args, kwargs)
        return result
