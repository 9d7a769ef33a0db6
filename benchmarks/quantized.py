"""Linear layers with the quantised weights of bitsandbytes, on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def quantize_linear(model: nn.Module, wanted: Callable[[nn.Module, str], bool], four_bits: bool = True) -> None:
    """Replaces the linear layers that `wanted(layer, name)` chooses by layers with NF4 weights, or 8-bit ones.

    At 4 bits, layers smaller than what the kernel for CPUs takes (64 inputs, 32 outputs) stay as they are.
    """
    import bitsandbytes

    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or not wanted(layer, name):
            continue
        sizes = (layer.in_features, layer.out_features, layer.bias is not None)
        if four_bits and (layer.in_features % 64 or layer.out_features % 32):
            continue
        made = (
            bitsandbytes.nn.Linear4bit(*sizes, quant_type="nf4", compute_dtype=torch.float32)
            if four_bits
            else bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        )
        made.load_state_dict(layer.state_dict())
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made.to("cpu").train(layer.training))
