"""The hooks that enter the mode around the forward of modules, without touching them.

They sit on the base model and on every adapted block, so that a block that is recomputed by a checkpoint sees the mode
too. In evaluation and without gradients nothing is entered: the model runs untouched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from .mode import ActivationMode
from .ops.leftovers import LeftoverHooks
from .ops.origin import Origin
from .settings import ActivationSettings
from .table.calls import OperatorCalls, plain_path


class Entered(NamedTuple):
    """What one call of `ActivationInterceptor.enter` has entered."""

    mode: ActivationMode | None
    leftovers: LeftoverHooks | None
    calls: OperatorCalls | None = None


class _InMode:
    """A function that runs in the interceptor's mode, also when nothing around it has entered it."""

    def __init__(self, function: Callable[..., Any], interceptor: ActivationInterceptor) -> None:
        self.function = function
        self.interceptor = interceptor
        self.path = interceptor.path_of(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        entered = self.interceptor.enter(path=self.path)
        try:
            return self.function(*args, **kwargs)
        finally:
            self.interceptor.leave(entered)


class _CheckpointInMode:
    """A module's checkpointing function (transformers): it recomputes `forward` alone, without the module's hooks."""

    def __init__(self, checkpoint: Callable[..., Any], interceptor: ActivationInterceptor) -> None:
        self.checkpoint = checkpoint
        self.interceptor = interceptor

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint(_InMode(function, self.interceptor), *args, **kwargs)


_CHECKPOINT = "_gradient_checkpointing_func"


class _State(threading.local):
    """What one thread has entered."""

    def __init__(self) -> None:
        self.entered: list[tuple[nn.Module, Entered]] = []
        self.depth = 0

    def __reduce__(self) -> tuple[type[_State], tuple[()]]:
        return _State, ()


class ActivationInterceptor:
    """The hooks of one base model.

    Attributes:
        layer: any tuner layer of the model; it knows which adapters are active.
    """

    def __init__(self) -> None:
        self.layer: BaseTunerLayer | None = None
        self._modes: dict[str, ActivationMode] = {}
        self._handles: dict[nn.Module, tuple[RemovableHandle, ...]] = {}
        self._paths: dict[nn.Module, str] = {}
        self._state = _State()

    def adapter_settings(self, adapter_name: str) -> ActivationSettings:
        """What is kept while `adapter_name` is active."""
        return self._modes[adapter_name].context.settings

    @property
    def active_adapter(self) -> str | None:
        """The adapter whose settings count."""
        mode = self.active_mode
        return next((name for name, known in self._modes.items() if known is mode), None)

    @contextmanager
    def counting(self, adapter_name: str) -> Iterator[tuple[dict[str, int], dict[str, Origin], Callable[[], str]]]:
        """Counts elements that operators keep; needs settings with `instances`.

        Gives elements by operator, of those that say it themselves, what operators that may be rebuilt are made from,
        and a function that tells which of the others, in this thread, is running.
        """
        context = self._modes[adapter_name].context
        context.kept = {}
        try:
            yield context.kept, context.origins, lambda: context.calls.current
        finally:
            context.kept = None

    def set_adapter_settings(self, adapter_name: str, settings: ActivationSettings) -> None:
        """Sets what is kept while `adapter_name` is active."""
        self._modes[adapter_name] = ActivationMode(settings)

    def delete_adapter_settings(self, adapter_name: str) -> None:
        self._modes.pop(adapter_name, None)

    def attach(self, module: nn.Module, path: str = "") -> None:
        """Registers the entering and the leaving hook on `module`, around all hooks that it has by now.

        `path` is the module's path in the base model, by which its operators are named. A second call for a module
        moves the hooks: those registered in between run inside the mode too.
        """
        for handle in self._handles.pop(module, ()):
            handle.remove()
        self._paths[module] = plain_path(path)
        enter = module.register_forward_pre_hook(self._enter, prepend=True)
        leave = module.register_forward_hook(self._leave, always_call=True)
        self._handles[module] = (enter, leave)

    def detach(self) -> None:
        """Removes every hook."""
        for module, handles in self._handles.items():
            for handle in handles:
                handle.remove()
            for child in module.modules():
                checkpoint = vars(child).get(_CHECKPOINT)
                if isinstance(checkpoint, _CheckpointInMode):
                    setattr(child, _CHECKPOINT, checkpoint.checkpoint)
        self._handles.clear()
        self._paths.clear()

    def path_of(self, function: Callable[..., Any]) -> str:
        """Path of the module that `function` is a method of, maybe with some arguments given; `""` for others."""
        owner = getattr(function, "__self__", None)
        while isinstance(function, partial):
            owner = function.args[0] if function.args else getattr(function.func, "__self__", None)
            function = function.func
        return self._paths.get(owner, "") if isinstance(owner, nn.Module) else ""

    def scoped(self, module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` as one more run of the module, where operators have names."""
        mode = self.active_mode
        if mode is None or mode.context.settings.instances is None:
            return function

        def run(*args: Any, **kwargs: Any) -> Any:
            with mode.context.calls.scope(self._paths.get(module, "")):
                return function(*args, **kwargs)

        return run

    def block_bits(self, module: nn.Module, numel: int) -> int | None:
        """Bits of the input of a block that is recomputed; `numel` elements of it are kept."""
        mode = self.active_mode
        return None if mode is None else mode.context.block_bits(self._paths.get(module, ""), numel)

    @property
    def active_mode(self) -> ActivationMode | None:
        """The mode of the first active adapter that has one, or None."""
        if self.layer is None or self.layer.disable_adapters:
            return None
        for name in self.layer.active_adapters:
            if name in self._modes:
                return self._modes[name]
        return None

    def enter(self, forward_only: bool = False, path: str | None = None) -> Entered:
        """Enters the active adapter's mode and the hooks for leftovers, each unless it is on top already.

        Args:
            forward_only: also where no gradient is taken: what is not needed any more is overwritten there too.
            path: of the module whose forward begins, where one does.
        """
        mode = self.active_mode if torch.is_grad_enabled() or forward_only else None
        if mode is None:
            return Entered(None, None)
        entered_mode = mode if self._state.depth == 0 else None
        leftovers = None if torch.compiler.is_compiling() else mode.leftovers
        if leftovers is not None and not leftovers.enter():
            leftovers = None
        if entered_mode is not None:
            entered_mode.__enter__()
            self._state.depth += 1
        calls = None
        if path is not None and mode.context.settings.instances is not None:
            calls = mode.context.calls
            calls.push(path)
        return Entered(entered_mode, leftovers, calls)

    def leave(self, entered: Entered) -> None:
        """Undoes `enter`."""
        if entered.calls is not None:
            entered.calls.pop()
        if entered.mode is not None:
            self._state.depth -= 1
            entered.mode.__exit__(None, None, None)
            if not torch.compiler.is_compiling():
                entered.mode.context.overwriting.restore()
        if entered.leftovers is not None:
            entered.leftovers.leave()

    def _enter(self, module: nn.Module, args: Any) -> None:
        entered = self.enter(path=self._paths.get(module)) if module.training else Entered(None, None)
        if entered.mode is not None and not torch.compiler.is_compiling():
            self._enter_in_recomputations(module)
        self._state.entered.append((module, entered))

    def _enter_in_recomputations(self, module: nn.Module) -> None:
        for child in module.modules():
            checkpoint = vars(child).get(_CHECKPOINT)
            if checkpoint is not None and not isinstance(checkpoint, _CheckpointInMode):
                setattr(child, _CHECKPOINT, _CheckpointInMode(checkpoint, self))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        # a hook of others may have raised before `_enter`: then there is nothing of this module to leave
        if self._state.entered and self._state.entered[-1][0] is module:
            self.leave(self._state.entered.pop()[1])
