"""What a kernel does that its inputs and outputs do not show: memory it takes while it runs, and its FLOPs.

Most kernels of torch take no memory besides their outputs. Convolutions on a CPU do: oneDNN works on copies of its
operands in its own layout, and copies the result back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten

_BACKENDS: Any = torch._C._ConvBackend  # type: ignore[attr-defined]
ONEDNN = {_BACKENDS.Mkldnn, _BACKENDS.MkldnnEmpty}
BLOCK = 16 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 8
"""Channels that oneDNN puts side by side: as many floats as a register holds."""


def _copied(tensor: Tensor | None) -> int:
    """Bytes of the copy that a kernel makes of a tensor whose elements do not lie side by side."""
    return 0 if tensor is None or tensor.is_contiguous() else _dense(tensor)


def _dense(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def _blocked(tensor: Tensor) -> int:
    """Bytes of a copy of an activation whose channels are rounded up to whole blocks."""
    channels = max(tensor.shape[1], 1)
    return _dense(tensor) // channels * (-(-channels // BLOCK) * BLOCK)


def _read(input: Tensor, weight: Tensor) -> int:
    """Bytes of the copy of a convolution's input; an image's few channels are read as they are, but by 1x1 kernels."""
    few = input.shape[1] < 8 and any(size > 1 for size in weight.shape[2:])
    return 0 if few else _blocked(input)


def _uses_onednn(input: Tensor, weight: Tensor, geometry: Sequence[Any]) -> bool:
    if input.device.type != "cpu":
        return False
    return torch._C._select_conv_backend(input, weight, None, *geometry, None) in ONEDNN


def _convolution(out: Any, input: Tensor, weight: Tensor, bias: Any, *geometry: Any) -> int:
    """Peak above the start: copies of input, weight and output; then the copy of the output and the output."""
    if not _uses_onednn(input, weight, geometry):
        return 0
    copy = _blocked(out)
    return max(_read(input, weight) + _dense(weight) + copy, copy + _dense(out))


def _convolution_backward(out: Any, grad: Tensor, input: Tensor, weight: Tensor, bias_sizes: Any, *rest: Any) -> int:
    """Peak above the start, of the input's gradient and then the weight's.

    A strided convolution without groups writes its input's gradient once more.
    """
    geometry, mask = rest[:-1], rest[-1]
    held = _copied(input)
    if not _uses_onednn(input, weight, geometry):
        return held + sum(map(_dense, out))
    grad_input = _dense(out[0]) if mask[0] else 0
    strided = any(stride != 1 for stride in geometry[0]) and geometry[-1] == 1
    peak = 0
    if mask[0]:
        copy = _blocked(out[0])
        peak = max(_blocked(grad) + _dense(weight) + copy, copy + (2 if strided else 1) * grad_input)
    # with the input's gradient comes the bias's, and oneDNN computes it together with the weight's
    if mask[1] or mask[2]:
        peak = max(peak, grad_input + _blocked(grad) + _read(input, weight) + 2 * _dense(weight))
    return held + peak


_PEAKS: dict[Any, Callable[..., int]] = {
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
}


def kernel_peak(function: Any, args: Sequence[Any], out: Any) -> int:
    """Bytes that the kernel holds at most above what was live before it, outputs included; 0: the outputs alone."""
    rule = _PEAKS.get(function)
    return 0 if rule is None else rule(out, *args)


def _attention_flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    count: int = sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape)
    return count


def _attention_backward_flops(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    count: int = sdpa_backward_flop_count(args[0].shape, args[1].shape, args[2].shape, args[3].shape)
    return count


_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def kernel_flops(function: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """FLOPs of products, convolutions and attention, by torch's own formulas; 0 for everything else."""
    formula = _FLOPS.get(function._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))
