"""Runs a model on a meta device: shapes and dependencies only, no data, no copy of the weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from ..memory.running import tensors_in
from ..memory.shape_copy import meta_copy
from ..structure import is_supported
from .discovery import own_modules
from .plain_layers import is_quantized, with_plain_layers

Size = int | Sequence[int] | None
"""Size of an image: one number, or one a dimension; `None` is the model's own."""

BATCH = 2
NUM_TOKENS = 11
"""Length of the token ids that a model of text, or of images and text, is run on."""
CURE = "set prompt_rank=0 and side_reduction=0, name other blocks in block_modules, or give block_shapes."
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)
"""What a model's own code raises when it cannot run on a meta input."""
INTERPOLATE = "interpolate_pos_encoding"
"""Argument by which models of transformers take images of another size than their own."""


def image_input(model: nn.Module, image_size: Size = None) -> tuple[int, ...]:
    """Channels and sizes of an image that the model takes.

    Args:
        image_size: the sizes, or one for all; `None`: the model's own.

    Raises:
        ValueError: if the model does not start with a convolution on images, or `image_size` has too few or too many
            sizes for it.
    """
    first = next((module for _, module in own_modules(model) if isinstance(module, _ConvNd)), None)
    if first is None or isinstance(first, nn.Conv1d):
        raise ValueError(
            "The model's input cannot be inferred: it does not start with a convolution on images. Prompts and side "
            f"branches need fixed input shapes: {CURE}"
        )
    dims = 3 if isinstance(first, nn.Conv3d) else 2
    size: int | Sequence[int] = image_size if image_size is not None else _stated_size(model)
    sizes = (size,) * dims if isinstance(size, int) else tuple(size)
    if image_size is not None and len(sizes) != dims:
        raise ValueError(f"image_size={image_size} must be one number or {dims} for {type(model).__name__}.")
    return (first.in_channels, *sizes[-dims:])


def _stated_size(model: nn.Module) -> int | tuple[int, ...]:
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


class Usage(NamedTuple):
    """What a model does with its modules.

    Attributes:
        behind: names of the modules with a parameter that some output of the model depends on.
        bypassed: of the layers that can carry a bias delta, those that the model reads a parameter of without calling
            them: what is added to such a layer is never seen.
    """

    behind: set[str]
    bypassed: set[str]


def _example(model: nn.Module, image_size: Size) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Sizes of one item, and the input of the model: an image, token ids, or both where the forward takes both."""
    taken = inspect.signature(model.forward).parameters
    tokens = torch.zeros(BATCH, NUM_TOKENS, dtype=torch.long, device="meta")
    try:
        sizes = image_input(model, image_size)
    except ValueError:
        if not takes_tokens(model):
            raise
        return (NUM_TOKENS,), {"input_ids": tokens}
    floating = (p.dtype for p in model.parameters() if p.dtype.is_floating_point)
    image = torch.empty(BATCH, *sizes, device="meta", dtype=next(floating, torch.float32))
    kwargs: dict[str, Any] = {"pixel_values": image} if "pixel_values" in taken else {"": image}
    if takes_tokens(model):
        kwargs["input_ids"] = tokens
    if image_size is not None and INTERPOLATE in taken:
        kwargs[INTERPOLATE] = True
    return sizes, kwargs


def _shape_copy(model: nn.Module) -> nn.Module:
    quantized = [name for name, module in model.named_modules() if is_quantized(module)]
    floating = (p.dtype for p in model.parameters() if p.dtype.is_floating_point)
    copy = with_plain_layers(meta_copy(model), quantized, next(floating, torch.float32))
    for parameter in copy.parameters():
        parameter.requires_grad_(False)
    return copy.eval()


def _note(called: set[str], name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    called.add(name)


def takes_tokens(model: nn.Module) -> bool:
    """Whether the model takes token ids."""
    return isinstance(model, PreTrainedModel) and "input_ids" in inspect.signature(model.forward).parameters


def dry_run(model: nn.Module, image_size: Size, watch: Callable[[nn.Module], None]) -> Usage | None:
    """Runs a copy of the model on an image, or on token ids where it takes those.

    Args:
        image_size: size of the image; `None`: the model's own.
        watch: is given the copy before it runs, to register hooks.

    Returns:
        what the model does with its modules; `None` where it cannot be run with gradients.

    Raises:
        ValueError: if the model cannot be run so.
    """
    sizes, kwargs = _example(model, image_size)
    args = (kwargs.pop(""),) if "" in kwargs else ()
    probe = _shape_copy(model)
    watch(probe)
    called: set[str] = set()
    layers = {name: layer for name, layer in own_modules(probe) if is_supported(layer)}
    for name, layer in layers.items():  # by name: under an adapter a stand-in runs in the layer's place
        layer.register_forward_pre_hook(partial(_note, called, name))
    try:
        behind = _modules_behind(_output_with_gradients(probe, args, kwargs), probe)
        bypassed = {name for name in layers.keys() - called if any(True for _ in layers[name].parameters())}
        return None if behind is None else Usage(behind, bypassed & behind)
    except FAILURES:
        pass  # code that can run without gradients only: what the outputs depend on stays unknown
    try:
        with torch.no_grad(), torch.device("meta"):
            probe.requires_grad_(False)(*args, **kwargs)
    except FAILURES as error:
        raise ValueError(
            f"The shapes of the blocks could not be found by running {type(model).__name__} on an input of shape "
            f"{sizes}: {type(error).__name__}: {error} To do without: {CURE}"
        ) from error
    return None


def _output_with_gradients(probe: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    for parameter in probe.parameters():
        parameter.requires_grad_(parameter.dtype.is_floating_point or parameter.dtype.is_complex)
    with torch.enable_grad(), torch.device("meta"):
        return tensors_in(probe(*args, **kwargs))


def _modules_behind(outputs: Iterable[torch.Tensor], probe: nn.Module) -> set[str] | None:
    """Names of the modules with a parameter in the graph of the outputs, or with none that could be in it."""
    nodes = [output.grad_fn for output in outputs if output.grad_fn is not None]
    if not nodes:
        return None
    seen: set[Any] = set(nodes)
    reached: set[int] = set()
    while nodes:
        node: Any = nodes.pop()
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    behind = set()
    for name, module in own_modules(probe):
        trainable = [id(parameter) for parameter in module.parameters() if parameter.requires_grad]
        if not trainable or not reached.isdisjoint(trainable):
            behind.add(name)
    return behind
