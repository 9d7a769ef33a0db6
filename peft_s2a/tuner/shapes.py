"""Finds the shapes of the blocks' inputs by a dry run of the model."""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from ..structure import BlockShape, Layout, find_channel_dim, is_supported
from .discovery import own_modules
from .dry_run import BATCH, CURE, NUM_TOKENS, Size, Usage, dry_run, image_input, takes_tokens
from .tensors import first_tensor

MAX_EXTRA_TOKENS = 64


class ShapeRecorder:
    """Collects what the blocks and the convolutions before them see during one run."""

    def __init__(self) -> None:
        self.inputs: dict[str, torch.Size] = {}
        self.outputs: dict[str, torch.Size] = {}
        self.first_layers: dict[str, tuple[nn.Module, torch.Size]] = {}
        self.patch_grid: tuple[int, ...] = ()

    def before_block(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensor = first_tensor(args, kwargs)
        if tensor is not None:
            self.inputs.setdefault(name, tensor.shape)

    def after_block(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tensor = first_tensor((output,), {})
        if tensor is not None:
            self.outputs.setdefault(name, tensor.shape)

    def before_layer(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], torch.Tensor):
            self.first_layers.setdefault(name, (module, args[0].shape))

    def after_convolution(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.inputs and isinstance(output, torch.Tensor):
            self.patch_grid = tuple(output.shape[2:])

    def watch(self, names: Collection[str], probe: nn.Module) -> None:
        """Registers the hooks for these blocks."""
        for name in names:
            block = probe.get_submodule(name)
            block.register_forward_pre_hook(partial(self.before_block, name), with_kwargs=True)
            block.register_forward_hook(partial(self.after_block, name))
            for _, layer in own_modules(block):
                if is_supported(layer) and not isinstance(layer, nn.MultiheadAttention):
                    layer.register_forward_pre_hook(partial(self.before_layer, name))
        for _, layer in own_modules(probe):
            if isinstance(layer, _ConvNd):
                layer.register_forward_hook(self.after_convolution)


def find_block_shapes(
    model: nn.Module, names: Collection[str], required: bool, image_size: Size = None
) -> tuple[dict[str, BlockShape], Usage | None]:
    """Shapes of the named blocks, and what `dry_run` returns.

    Args:
        required: whether a block that the model does not use is an error (blocks that the user named) or is left out.
        image_size: size of the image; `None`: the model's own.

    Raises:
        ValueError: if the model cannot be run on an image, or a block's shape is not understood.
    """
    recorder = ShapeRecorder()
    used = dry_run(model, image_size, partial(recorder.watch, names))
    sizes = image_input(model, image_size)
    if takes_tokens(model):  # sequences of text have no fixed length, hence no prompt, unless their shape is given
        of_text = [name for name, shape in recorder.inputs.items() if len(shape) == 3 and shape[1] == NUM_TOKENS]
        for name in of_text:
            del recorder.inputs[name]
    missing = [name for name in names if name not in recorder.inputs or name not in recorder.outputs]
    if missing and (required or len(missing) == len(names)):
        raise ValueError(
            f"The blocks {missing[:3]} take no tensor of a fixed length when the model runs on an image: {CURE}"
        )
    chosen = [n for n in names if n not in missing and (required or used is None or n in used.behind)]
    return {name: _describe(name, recorder, sizes[1:]) for name in chosen}, used


def _describe(name: str, recorder: ShapeRecorder, image_size: tuple[int, ...]) -> BlockShape:
    shape, output = recorder.inputs[name], recorder.outputs[name]
    if len(shape) != len(output) or shape[0] != BATCH or not 3 <= len(shape) <= 5:
        raise ValueError(
            f"Block {name!r} gets an input of shape {tuple(shape)} and gives {tuple(output)} for a batch of {BATCH}; "
            f"prompt and side branch need (batch, tokens, channels) or a map: {CURE}"
        )
    if len(shape) == 3:
        grid, num_extra = token_grid(name, shape[1], recorder.patch_grid or image_size)
        return BlockShape("tokens", shape[2], output[2], grid, num_extra, image_size)
    layout = _map_layout(recorder.first_layers.get(name))
    dim = 1 if layout == "channels_first" else -1
    grid = tuple(shape[2:]) if dim == 1 else tuple(shape[1:-1])
    return BlockShape(layout, shape[dim], output[dim], grid, 0, image_size)


def _map_layout(first_layer: tuple[nn.Module, torch.Size] | None) -> Layout:
    """Layout of a map, from the layer that works on it first."""
    if first_layer is None:
        return "channels_first"
    layer = first_layer[0]
    if isinstance(layer, (nn.Linear, Conv1D)):
        return "channels_last"
    if isinstance(layer, (_ConvNd, _BatchNorm, nn.GroupNorm)) or find_channel_dim(layer) == 1:
        return "channels_first"
    return "channels_last"


def token_grid(name: str, num_tokens: int, patch_grid: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """The patch grid of a token sequence, and the number of extra tokens in front of it.

    The grid is that of the patch embedding, or that divided by a power of two (merged patches), whichever is the
    largest to fit.

    Raises:
        ValueError: if none fits.
    """
    for power in range(7):
        grid = tuple(math.ceil(cells / 2**power) for cells in patch_grid)
        extra = num_tokens - math.prod(grid)
        if extra >= 0:
            if extra <= MAX_EXTRA_TOKENS:
                return grid, extra
            break
    raise ValueError(
        f"Block {name!r} gets {num_tokens} tokens, which fit no patch grid (the patch embedding gives "
        f"{' x '.join(map(str, patch_grid))} positions): set prompt_rank=0 for this model, or give block_shapes."
    )
