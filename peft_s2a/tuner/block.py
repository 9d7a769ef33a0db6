"""The adapter of a block: prompt and side branch, attached by hooks and a child module."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..blockwise import leave_prompt, takes_joined, takes_prompt
from ..structure import BlockShape, SideWeights, add_side, pool_for_side, pooled_width, prompt_for
from .config import S2AConfig
from .image_size import ImageSize
from .layer import S2ALayer
from .matching import CHILD_NAME
from .mixed_batch import check_length, items_of, mixed_names
from .tensors import first_tensor, replace_argument, replace_first

PROMPT_LEAVES = ("s2a_prompt_a", "s2a_prompt_b")
SIDE_LEAVES = ("s2a_side_down_weight", "s2a_side_down_bias", "s2a_side_up_weight", "s2a_side_up_bias")
INIT_STD = 0.02


class _Pooled(threading.local):
    """What a thread's forward has pooled of a block's input, and of which items; copies of a block begin without."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[torch.Tensor, list[int] | None]] = {}

    def __reduce__(self) -> tuple[type[_Pooled], tuple[()]]:
        return _Pooled, ()


class BlockAdapter(nn.Module, S2ALayer):
    """Prompt and side branch of one block, for every adapter.

    It is a child of the block and acts through the block's hooks: the block keeps its class, path and attributes. Where
    nobody else looks at the block's input, the prompt is left to the block's forward, which adds it piece by piece.

    Args:
        block: the block; kept outside the modules, for its device.
        image_size: the sizes of the image being processed, shared by all blocks.
    """

    adapter_layer_names: tuple[str, ...] = (*PROMPT_LEAVES, *SIDE_LEAVES)
    other_param_names: tuple[str, ...] = ("shapes", "reductions")
    weight: Any = None  # a tuner layer without a base layer: PEFT's properties would look for one for ever
    bias: Any = None

    def __init__(self, block: nn.Module, image_size: ImageSize) -> None:
        super().__init__()
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.shapes: dict[str, BlockShape] = {}
        self.reductions: dict[str, int] = {}
        self.image_size = image_size
        self._block = (block,)
        self._pooled = _Pooled()
        self._disable_adapters = False
        self.merged_adapters = []

    def _leaf(self, name: str) -> nn.ParameterDict:
        leaf: nn.ParameterDict = getattr(self, name)
        return leaf

    def update_layer(self, adapter_name: str, key: str, shape: BlockShape, config: S2AConfig) -> None:
        """Adds the adapter to the block of this full name, or makes it anew."""
        rank, reduction = config.block_sizes(key)
        self.shapes[adapter_name] = shape
        self.reductions[adapter_name] = reduction
        for name, value in self._initial(shape, rank, reduction, config.init_weights).items():
            getattr(self, name)[adapter_name] = nn.Parameter(value)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @staticmethod
    def _initial(shape: BlockShape, rank: int, reduction: int, init_weights: bool) -> dict[str, torch.Tensor]:
        def last(*size: int) -> torch.Tensor:
            """The factor that is zero at the start, so that the adapter is the identity."""
            return torch.zeros(size) if init_weights else torch.randn(size) * INIT_STD

        values: dict[str, torch.Tensor] = {}
        if rank:
            values["s2a_prompt_a"] = torch.randn(shape.num_positions, rank) * INIT_STD
            values["s2a_prompt_b"] = last(rank, shape.channels)
        if reduction:
            width = pooled_width(shape.channels, reduction)
            values["s2a_side_down_weight"] = torch.randn(width, width) / math.sqrt(width)
            values["s2a_side_down_bias"] = torch.zeros(width)
            values["s2a_side_up_weight"] = last(shape.out_channels, width)
            values["s2a_side_up_bias"] = last(shape.out_channels)
        return values

    def _acting(self, leaf: str, x: torch.Tensor | None) -> Iterator[tuple[str, list[int] | None]]:
        """Adapters that act and have this leaf, each with the items of the batch that it acts on; None: on all."""
        if self.disable_adapters or x is None:
            return
        names = mixed_names()
        acting = self.active_adapters if names is None else dict.fromkeys(names)
        for name in acting:
            if name not in getattr(self, leaf):
                continue
            if names is not None:
                check_length(len(x), names)
            yield name, None if names is None else items_of(name, names)

    def before_block(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook: adds the active adapters' prompts to the block's input, and pools it for their branches."""
        pooled = self._pooled.found = {}
        leave_prompt(block, None)
        x = first_tensor(args, kwargs)
        if x is None:
            return None
        prompts = [(self._prompt(name, x), items) for name, items in self._acting("s2a_prompt_a", x)]
        # pooled before the block: the gradient, which is as large as x, is made after the block's and not beside them
        if prompts and mixed_names() is None and takes_prompt(block, x, args):
            prompt = functools.reduce(torch.add, (prompt for prompt, _ in prompts))
            for name, _ in self._acting("s2a_side_up_weight", x):
                about = self.shapes[name], self.reductions[name]
                pooled[name] = pool_for_side(x, *about) + pool_for_side(prompt, *about), None
            leave_prompt(block, prompt)  # the block's forward takes it, or, after an error, `after_block`
            return None
        y = x
        for prompt, items in prompts:
            y = _add(y, prompt, items)
        for name, items in self._acting("s2a_side_up_weight", x):
            inside = y if items is None else y[items]
            pooled[name] = pool_for_side(inside, self.shapes[name], self.reductions[name]), items
        return replace_argument(args, kwargs, x, y) if prompts else None

    def _prompt(self, name: str, x: torch.Tensor) -> torch.Tensor:
        a, b = (self._leaf(leaf)[name] for leaf in PROMPT_LEAVES)
        return prompt_for(x, a, b, self.shapes[name], self.image_size.current)

    def after_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook, called after an error, too: adds the active adapters' side branches to the block's output."""
        pooled, self._pooled.found = self._pooled.found, {}
        leave_prompt(block, None)
        y = first_tensor((output,), {})
        if y is None:
            return None
        total = y
        for name, (features, items) in pooled.items():
            weights = SideWeights(*(self._leaf(leaf)[name] for leaf in SIDE_LEAVES))
            about = features, weights, self.shapes[name]
            if items is None:
                total = add_side(total, *about, in_place=takes_joined(block, total))
            else:
                index = torch.tensor(items, device=total.device)
                total = total.index_copy(0, index, add_side(total[items], *about))
        return replace_first(output, y, total) if pooled else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Not called: the adapter acts through the block's hooks."""
        raise RuntimeError("The adapter of a block is not called: it acts through the block's hooks.")

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        own = {id(parameter) for parameter in self.parameters()}
        others = (p for p in self._block[0].parameters() if id(p) not in own and p.dtype.is_floating_point)
        anchor = next(others, None)
        if anchor is None or anchor.device.type == "meta":
            return
        for name in self.adapter_layer_names:
            leaf = getattr(self, name)
            if adapter_name in leaf and leaf[adapter_name].device.type != "meta":
                leaf[adapter_name] = leaf[adapter_name].to(device or anchor.device, anchor.dtype)

    def can_merge(self, adapter_name: str) -> str | None:
        parts = [
            part
            for part, leaf in (("prompt", "s2a_prompt_a"), ("side branch", "s2a_side_up_weight"))
            if adapter_name in getattr(self, leaf)
        ]
        return f"its {' and '.join(parts)} cannot be folded into the base model's weights" if parts else None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing to merge; refuses adapters with a prompt or side branch."""
        for name in adapter_names if adapter_names is not None else self.active_adapters:
            reason = self.can_merge(name)
            if reason:
                raise ValueError(f"Adapter {name!r} cannot be merged: {reason}.")

    def unmerge(self) -> None:
        """Nothing was merged."""


def attach(block: nn.Module, image_size: ImageSize) -> BlockAdapter:
    """The block's adapter, made and hooked up at the first call.

    Raises:
        ValueError: if the block has a child of that name already.
    """
    child = getattr(block, CHILD_NAME, None)
    if isinstance(child, BlockAdapter):
        return child
    if child is not None:
        raise ValueError(
            f"{type(block).__name__} has an attribute {CHILD_NAME!r} already; leave it out of block_modules."
        )
    adapter = BlockAdapter(block, image_size)
    block.add_module(CHILD_NAME, adapter)
    block.register_forward_pre_hook(adapter.before_block, with_kwargs=True)
    block.register_forward_hook(adapter.after_block, with_kwargs=True, always_call=True)
    return adapter


def _add(total: torch.Tensor, part: torch.Tensor, items: list[int] | None) -> torch.Tensor:
    """Adds a part to some items of the batch, or to all."""
    if items is None:
        return total + part
    index = torch.tensor(items, device=total.device)
    return total.index_add(0, index, part.expand(len(items), *part.shape[1:]).to(total.dtype))


def remove_hooks(module: nn.Module, owner: object) -> None:
    """Removes the module's forward hooks that are methods of the owner."""
    for hooks, flags in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is owner]:
            del hooks[key]
            flags.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)


def detach_all(model: nn.Module) -> None:
    """Removes the adapters of all blocks and their hooks."""
    for module in list(model.modules()):
        child = module._modules.get(CHILD_NAME)
        if isinstance(child, BlockAdapter):
            remove_hooks(module, child)
            del module._modules[CHILD_NAME]
