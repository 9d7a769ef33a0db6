"""Which kernels run compiled: the one place where a kernel's source meets `torch.compile`.

A kernel is a plain function `kernel(spec, *tensors)`: `spec` is hashable and holds all that is no tensor. It runs as it
is (eagerly, the reference), or compiled by Inductor, once for each combination of kernel, spec, dtypes, layouts and
device. The first dimension of every tensor is dynamic: another batch size runs the same code.
"""

from __future__ import annotations

import itertools
import threading
import time
import types
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

Kernel = Callable[..., Any]

MIN_ELEMENTS = 1 << 16
"""Kernels on smaller tensors run eagerly: a call of compiled code costs as much as their work."""


@dataclass
class KernelReport:
    """How one kernel runs.

    Attributes:
        kernel: name of the function, and what it was compiled for.
        device: `"cpu"`, `"cuda"`, ...
        compiled: whether it runs compiled.
        reason: why it does not; empty if it does.
        seconds: what compiling took, 0 if it was not tried. The code itself comes from Inductor's cache on disk if it
            was compiled there before.
    """

    kernel: str
    device: str
    compiled: bool
    reason: str = ""
    seconds: float = 0.0


_compiled: dict[Hashable, Kernel] = {}
_reports: dict[Hashable, KernelReport] = {}
_failures: dict[str, str] = {}  # device and reason: where there is no compiler nothing more is tried
_numbers = itertools.count()
_lock = threading.RLock()


def chosen_backend(backend: str, device: torch.device) -> str:
    """`"compile"` or `"eager"`: what `"auto"` means on a device.

    On a CPU compiled kernels save a few percent of a step and cost half a minute at the start: not worth it unasked. On
    a GPU every operator of an eager kernel is a launch and a pass over the memory.
    """
    if backend != "auto":
        return backend
    return "compile" if device.type == "cuda" else "eager"


def compiles(backend: str, tensor: Tensor) -> bool:
    """Whether a kernel on a tensor of this size and kind runs compiled."""
    return (
        tensor.numel() >= MIN_ELEMENTS
        and tensor.shape[0] > 1
        and chosen_backend(backend, tensor.device) == "compile"
        and tensor.device.type not in _failures
        and not torch.compiler.is_compiling()
        and type(tensor) is Tensor
        and _get_current_dispatch_mode() is None
    )


def run(backend: str, kernel: Kernel, spec: Hashable, *tensors: Tensor | None) -> Any:
    """`kernel(spec, *tensors)`, compiled if the backend says so and the first tensor is large enough."""
    first = tensors[0]
    assert first is not None
    if not compiles(backend, first):
        return kernel(spec, *tensors)
    # inside an operator a piece is still a view of a tensor with a gradient, which a tracer would follow
    tensors = tuple(None if t is None else t.detach() for t in tensors)
    layouts = tuple(None if t is None else (t.dtype, t.shape[1:], t.stride()[1:]) for t in tensors)
    key = kernel, spec, first.device, layouts
    compiled = _compiled.get(key)
    if compiled is None:
        return _first_call(key, kernel, spec, tensors)
    return compiled(*tensors)


def _first_call(key: Hashable, kernel: Kernel, spec: Hashable, tensors: tuple[Tensor | None, ...]) -> Any:
    first = tensors[0]
    assert first is not None
    device = first.device.type
    with _lock:
        if device in _failures:
            return kernel(spec, *tensors)
        compiled = _compile(kernel, spec)
        for tensor in tensors:
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        start = time.perf_counter()
        try:
            result = compiled(*tensors)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever is missing or unsupported: the reference does the same work
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            _reports[key] = KernelReport(f"{kernel.__name__} {spec}", device, False, reason)
            if _compiler_works(first.device):
                _compiled[key] = partial(kernel, spec)
                _warn(f"Calls of {kernel.__name__} for {device}", reason, "Please report this as an issue")
            else:
                _failures[device] = reason
                _warn(f"Kernels for {device}", reason, "Install a C++ compiler (CPU) or Triton (GPU)")
            return kernel(spec, *tensors)
        seconds = time.perf_counter() - start
        _compiled[key] = compiled
        _reports[key] = KernelReport(f"{kernel.__name__} {spec}", device, True, "", seconds)
        return result


def _compile(kernel: Kernel, spec: Hashable) -> Kernel:
    def bound(*tensors: Tensor) -> Any:
        return kernel(spec, *tensors)

    # A code object of its own, by a name of its own: torch counts recompilations by code object, and gives up after a
    # few; by name it remembers which numbers differed between calls, and would make variables of those in the spec.
    code = bound.__code__.replace(co_name=f"{kernel.__name__}_{next(_numbers)}")
    own = types.FunctionType(code, bound.__globals__, kernel.__name__, None, bound.__closure__)
    # numbers that are kept in bfloat16 are rounded where the source says so, also in what is computed from them
    return torch.compile(own, fullgraph=True, options={"emulate_precision_casts": True})


def _compiler_works(device: torch.device) -> bool:
    """Whether anything can be compiled for the device."""
    try:
        torch.compile(lambda x: x + 1, fullgraph=True)(torch.zeros(8, device=device))
    except Exception:
        return False
    return True


def _warn(what: str, reason: str, cure: str) -> None:
    warnings.warn(
        f"{what} cannot be compiled and run eagerly, with the same results: {reason} "
        f"{cure}, or set activation_backend='eager' to do without.",
        UserWarning,
        stacklevel=3,
    )


@dataclass(frozen=True)
class BackendReport:
    """What `explain_backend` tells.

    Attributes:
        kernels: one entry for each kernel that was to be compiled in this process.
        failures: for each device on which nothing can be compiled, why; its kernels run eagerly.
        cache: folder in which Inductor keeps compiled code, also for other processes.
    """

    kernels: tuple[KernelReport, ...]
    failures: dict[str, str]
    cache: str

    def __str__(self) -> str:
        lines = [
            f"activation_backend='auto' is 'eager' on a CPU, 'compile' on CUDA; compiled code lies in {self.cache}"
        ]
        lines += [f"{device}: eager, because compiling failed: {reason}" for device, reason in self.failures.items()]
        for k in self.kernels:
            state = f"compiled in {k.seconds:.1f} s" if k.compiled else f"eager ({k.reason})"
            lines.append(f"{k.device}: {state}: {k.kernel}")
        if not self.kernels:
            lines.append(f"No kernel was compiled so far; tensors of fewer than {MIN_ELEMENTS} elements run eagerly.")
        return "\n".join(lines)


def explain_backend() -> BackendReport:
    """Which kernels of this process run compiled, and why others do not.

    Kernels that were never asked to be compiled (`activation_backend="eager"`, or `"auto"` on a CPU) run eagerly and
    are not listed; nor are small tensors.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    with _lock:
        return BackendReport(tuple(_reports.values()), dict(_failures), cache_dir())


def forget() -> None:
    """Forgets compiled kernels and failures; what is compiled is compiled anew (from the cache on disk)."""
    with _lock:
        _compiled.clear()
        _reports.clear()
        _failures.clear()
