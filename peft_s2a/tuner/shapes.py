"""Finds the shapes of the blocks' inputs by running the model on a meta device: shapes only, no data, no copy."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from ..structure import BlockShape, Layout, find_channel_dim, is_supported
from .discovery import own_modules
from .tensors import first_tensor

BATCH = 2
MAX_EXTRA_TOKENS = 64
CURE = "set prompt_rank=0 and side_reduction=0, name other blocks in block_modules, or give block_shapes."
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)
"""What a model's own code raises when it cannot run on a meta input."""


def image_input(model: nn.Module) -> tuple[int, ...]:
    """Channels and sizes of an image that the model takes.

    Raises:
        ValueError: if the model does not start with a convolution on images.
    """
    first = next((module for _, module in own_modules(model) if isinstance(module, _ConvNd)), None)
    if first is None or isinstance(first, nn.Conv1d):
        raise ValueError(
            "The model's input cannot be inferred: it does not start with a convolution on images. Prompts and side "
            f"branches need fixed input shapes: {CURE}"
        )
    dims = 3 if isinstance(first, nn.Conv3d) else 2
    size = _image_size(model)
    sizes = (size,) * dims if isinstance(size, int) else tuple(size)
    return (first.in_channels, *sizes[-dims:])


def _image_size(model: nn.Module) -> int | tuple[int, ...]:
    """The image size that the model states, 224 where it takes any."""
    for module in model.modules():
        size = getattr(module, "img_size", None)
        if isinstance(size, (int, tuple, list)):
            return size if isinstance(size, int) else tuple(size)
    config = getattr(model, "config", None)
    for source in (getattr(config, "vision_config", None), config, model):
        size = getattr(source, "image_size", None)
        if isinstance(size, Mapping):
            return (size["height"], size["width"])
        if isinstance(size, (int, tuple, list)):
            return size if isinstance(size, int) else tuple(size)
    for source in (config, model):
        cfg = getattr(source, "pretrained_cfg", None) or getattr(source, "default_cfg", None)
        size = cfg.get("input_size") if isinstance(cfg, Mapping) else getattr(cfg, "input_size", None)
        if size:
            return tuple(size)[1:]
    return 224


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the model in eval mode whose tensors have shapes but no data."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(tensor, nn.Parameter):
                meta = torch.empty_like(tensor, device="meta")
                memo[id(tensor)] = nn.Parameter(meta, requires_grad=False)
            elif isinstance(tensor, torch.Tensor):
                memo[id(tensor)] = torch.empty_like(tensor, device="meta")
    return copy.deepcopy(model, memo).eval()


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


def find_block_shapes(model: nn.Module, names: Collection[str], required: bool) -> dict[str, BlockShape]:
    """Shapes of the named blocks.

    Args:
        required: whether a block that the model does not run is an error (blocks that the user named) or is left out.

    Raises:
        ValueError: if the model cannot be run on an image, or a block's shape is not understood.
    """
    sizes = image_input(model)
    recorder = ShapeRecorder()
    probe = meta_copy(model)
    for name in names:
        block = probe.get_submodule(name)
        block.register_forward_pre_hook(partial(recorder.before_block, name), with_kwargs=True)
        block.register_forward_hook(partial(recorder.after_block, name))
        for _, layer in own_modules(block):
            if is_supported(layer) and not isinstance(layer, nn.MultiheadAttention):
                layer.register_forward_pre_hook(partial(recorder.before_layer, name))
    for _, layer in own_modules(probe):
        if isinstance(layer, _ConvNd):
            layer.register_forward_hook(recorder.after_convolution)
    floating = (p.dtype for p in model.parameters() if p.dtype.is_floating_point)
    image = torch.empty(BATCH, *sizes, device="meta", dtype=next(floating, torch.float32))
    try:
        with torch.no_grad(), torch.device("meta"):
            probe(image)
    except FAILURES as error:
        raise ValueError(
            f"The shapes of the blocks could not be found by running {type(model).__name__} on an image of shape "
            f"{sizes}: {type(error).__name__}: {error} To do without: {CURE}"
        ) from error
    missing = [name for name in names if name not in recorder.inputs or name not in recorder.outputs]
    if missing and (required or len(missing) == len(names)):
        raise ValueError(f"The blocks {missing[:3]} take no tensor when the model runs on an image: {CURE}")
    return {name: _describe(name, recorder, sizes[1:]) for name in names if name not in missing}


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
