"""Runs a model on a meta device: shapes and dependencies only, no data, no copy of the weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from ..memory.running import tensors_in
from ..memory.shape_copy import meta_copy
from .discovery import own_modules

Size = int | Sequence[int] | None
"""Size of an image: one number, or one a dimension; `None` is the model's own."""

BATCH = 2
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


def dry_run(model: nn.Module, image_size: Size, watch: Callable[[nn.Module], None]) -> set[str] | None:
    """Runs a copy of the model on an image.

    Args:
        image_size: size of the image; `None`: the model's own.
        watch: is given the copy before it runs, to register hooks.

    Returns:
        names of the modules with a parameter that some output of the model depends on; `None` where the model cannot
        be run with gradients.

    Raises:
        ValueError: if the model cannot be run on an image.
    """
    sizes = image_input(model, image_size)
    probe = meta_copy(model).requires_grad_(False).eval()
    watch(probe)
    floating = (p.dtype for p in model.parameters() if p.dtype.is_floating_point)
    image = torch.empty(BATCH, *sizes, device="meta", dtype=next(floating, torch.float32))
    kwargs: dict[str, Any] = {}
    if image_size is not None and INTERPOLATE in inspect.signature(probe.forward).parameters:
        kwargs[INTERPOLATE] = True
    try:
        return _modules_behind(_output_with_gradients(probe, image, kwargs), probe)
    except FAILURES:
        pass  # code that can run without gradients only: what the outputs depend on stays unknown
    try:
        with torch.no_grad(), torch.device("meta"):
            probe.requires_grad_(False)(image, **kwargs)
    except FAILURES as error:
        raise ValueError(
            f"The shapes of the blocks could not be found by running {type(model).__name__} on an image of shape "
            f"{sizes}: {type(error).__name__}: {error} To do without: {CURE}"
        ) from error
    return None


def _output_with_gradients(probe: nn.Module, image: torch.Tensor, kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    for parameter in probe.parameters():
        parameter.requires_grad_(parameter.dtype.is_floating_point or parameter.dtype.is_complex)
    with torch.enable_grad(), torch.device("meta"):
        return tensors_in(probe(image, **kwargs))


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
