"""Peers of S2A that PEFT does not have for vision models: deep visual prompts and bottleneck adapters.

Both are children of the model's blocks with forward hooks, so that the model's own code stays as it is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from peft_s2a.structure import BlockShape
from peft_s2a.tuner.discovery import find_blocks
from peft_s2a.tuner.shapes import find_block_shapes

NUM_PROMPTS = 10
BOTTLENECK = 16


class NotApplicableError(Exception):
    """The method does not exist for this model; the message says why."""


class VisualPrompts(nn.Module):
    """Prompts of one block of VPT-deep (Jia et al., 2022): (n, D), learned, the same for every image.

    They stand behind the tokens (B, L, D) that enter the block; what the block makes of them is dropped, as the next
    block has prompts of its own. Blocks see no order of tokens, so that behind is as good as in front.
    """

    def __init__(self, channels: int, patch: int, count: int = NUM_PROMPTS) -> None:
        super().__init__()
        bound = math.sqrt(6 / (3 * patch**2 + channels))  # as the authors' code starts them
        self.prompts = nn.Parameter(torch.empty(count, channels).uniform_(-bound, bound))

    def append(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook: the block's tokens, then the prompts."""
        if args:
            return (self._joined(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self._joined(kwargs["hidden_states"])}

    def _joined(self, tokens: Tensor) -> Tensor:
        return torch.cat([tokens, self.prompts.to(tokens.dtype).expand(len(tokens), -1, -1)], dim=1)

    def remove(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook: the block's output without the prompts' rows."""
        count = len(self.prompts)
        if isinstance(output, tuple):
            return (output[0][:, :-count], *output[1:])
        return output[:, :-count]


class Bottleneck(nn.Module):
    """y + up(relu(down(y))) behind a block (Houlsby et al., 2019; one a block, as Pfeiffer et al., 2021).

    `up` starts at zero: a fresh adapter is the identity. Maps of channels first (B, D, H, W) have 1 x 1 convolutions.
    """

    def __init__(self, shape: BlockShape, width: int = BOTTLENECK) -> None:
        super().__init__()
        channels = shape.out_channels
        if shape.layout == "channels_first":
            self.down: nn.Module = nn.Conv2d(channels, width, 1)
            self.up: nn.Module = nn.Conv2d(width, channels, 1)
        else:
            self.down, self.up = nn.Linear(channels, width), nn.Linear(width, channels)
        for parameter in self.up.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        adapted: Tensor = features + self.up(torch.relu(self.down(features)))
        return adapted

    def hook(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook: the block's output through the adapter."""
        return (self(output[0]), *output[1:]) if isinstance(output, tuple) else self(output)


def add_visual_prompts(model: nn.Module) -> None:
    """Gives every block prompts of its own.

    Raises:
        NotApplicableError: unless every block takes the same tokens: prompts are tokens, which convolutions do not
            have, and in Swin's windows they would have to be put into each window.
    """
    names = find_blocks(model)
    shapes, _ = find_block_shapes(model, names, required=False)
    kinds = {(shape.layout, shape.channels, shape.num_positions) for shape in shapes.values()}
    if len(shapes) < len(names) or len(kinds) != 1 or next(iter(kinds))[0] != "tokens":
        raise NotApplicableError("prompts are tokens, and this model is no plain sequence of blocks on tokens")
    for name in names:
        shape, block = shapes[name], model.get_submodule(name)
        patch = max(shape.image_size[-1] // shape.grid[-1], 1) if shape.image_size else 16
        prompts = VisualPrompts(shape.channels, patch)
        block.add_module("visual_prompts", prompts)
        block.register_forward_pre_hook(prompts.append, with_kwargs=True)
        block.register_forward_hook(prompts.remove)


def add_bottlenecks(model: nn.Module) -> None:
    """Puts a bottleneck adapter behind every block.

    Raises:
        NotApplicableError: if the shape of some block cannot be found.
    """
    names = find_blocks(model)
    shapes, _ = find_block_shapes(model, names, required=False)
    if not names or len(shapes) < len(names):
        raise NotApplicableError("no blocks of known shape were found")
    for name in names:
        block, adapter = model.get_submodule(name), Bottleneck(shapes[name])
        block.add_module("bottleneck", adapter)
        block.register_forward_hook(adapter.hook)
