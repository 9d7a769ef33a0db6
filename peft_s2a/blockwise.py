"""Runs a block a few items of the batch at a time, and, where that is asked for, once more in backward.

What a block needs for itself (the wide layer of an MLP, queries, keys and values, gradients of all of them) is then
there for a few items only. Blocks of a network treat the items of a batch alike; whether this one does is tried out on
its first two items, and a block that mixes items, or that somebody watches from inside, runs on the whole batch.

A prompt that is added to the block's input is added to each piece: no second input is held for the length of the block.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .interception import ActivationInterceptor
from .ops.joining import in_pieces
from .ops.recompute import recompute
from .pieces import shortening_mode
from .structure.bias import shared_sums

CPU_PIECE = 3 << 17
"""Elements of a block's input that are worth a call of their own on a CPU; fewer are slower."""
DEVICE_PIECE, DEVICE_PIECE_AGAIN = 1 << 22, 1 << 21
"""The same elsewhere, enough to hide launches; the latter where the block runs again, with more live beside them."""

MixesItems = Callable[[nn.Module], bool]

_PACKAGE = __name__.partition(".")[0]

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class _Left(threading.local):
    """A prompt that a thread has left for the forward that it is about to call; copies of a block begin without."""

    prompt: Tensor | None = None

    def __reduce__(self) -> tuple[type[_Left], tuple[()]]:
        return _Left, ()


class BlockForward:
    """Takes the place of a block's `forward`.

    Args:
        block: the block; it keeps its class and attributes.
        interceptor: tells which adapter is active, and with what settings.
        mixes_items: tells that a block takes statistics of the batch.
    """

    def __init__(self, block: nn.Module, interceptor: ActivationInterceptor, mixes_items: MixesItems) -> None:
        self.block = block
        self.interceptor = interceptor
        self.mixes_items = mixes_items
        self.replaced: Callable[..., Any] | None = vars(block).get("forward")
        self.treats_items_alike: bool | None = None
        self.left = _Left()

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._forward)

    @property
    def _forward(self) -> Callable[..., Any]:
        """The forward that was there before."""
        return self.replaced or type(self.block).forward.__get__(self.block)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """The forward on some items, whose operators have the names that they have on all of them."""
        return self.interceptor.scoped(self.block, self._forward)(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        prompt, self.left.prompt = self.left.prompt, None
        mode = self.interceptor.active_mode
        if mode is None or not self.block.training or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self._forward(*_prompted(args, prompt), **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        x = next((t for t in leaves if isinstance(t, Tensor)), None)
        if x is None or x.dim() < 2 or not all(isinstance(t, (Tensor, *_PLAIN)) for t in leaves):
            # a cache, say: it must see every call once
            return self._forward(*_prompted(args, prompt), **kwargs)
        settings = mode.context.settings
        again = settings.recompute_blocks and self._needs_grad(leaves)

        def run(*args: Any, **kwargs: Any) -> Any:
            args = _prompted(args, prompt)
            if not again:
                return self._run(*args, **kwargs)
            x = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
            bits = self.interceptor.block_bits(self.block, x.numel())
            return recompute(self._in_mode, self.block, args, kwargs, x, bits, settings.rounding)

        size = self._items_per_piece(x, leaves, again)
        if size >= len(x) or not self._can_split(x, leaves, spec, prompt):
            return run(*args, **kwargs)

        def run_piece(piece: Tensor) -> Any:
            args, kwargs = tree_unflatten([piece if t is x else t for t in leaves], spec)
            return run(*args, **kwargs)

        with shared_sums():
            simulation = shortening_mode()
            if simulation is None:
                output = in_pieces(run_piece, x, size)
            else:
                output = simulation.all_at_once(lambda x: in_pieces(run_piece, x, len(x)), x, size)
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor):
                    setattr(tensor, _JOINED_BY, (id(self.block), tensor._version))
            return output

    def _in_mode(self, *args: Any, **kwargs: Any) -> Any:
        entered = self.interceptor.enter(forward_only=True)
        try:
            with shared_sums(False):
                return self._run(*args, **kwargs)
        finally:
            self.interceptor.leave(entered)

    def _needs_grad(self, leaves: list[Any]) -> bool:
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        return any(t.requires_grad for t in (*tensors, *self.block.parameters()))

    @staticmethod
    def _items_per_piece(x: Tensor, leaves: list[Any], again: bool) -> int:
        if len(x) < 2 or any(isinstance(t, Tensor) and t is not x and t.dim() and t.shape[0] != 1 for t in leaves):
            return len(x)  # which of the others belong to the items is not known
        size = CPU_PIECE if x.device.type == "cpu" else DEVICE_PIECE_AGAIN if again else DEVICE_PIECE
        return max(1, -(-size * len(x) // max(x.numel(), 1)))

    def _can_split(self, x: Tensor, leaves: list[Any], spec: Any, prompt: Tensor | None) -> bool:
        if self.mixes_items(self.block) or any(map(_is_watched, self.block.modules())):
            return False
        if self.treats_items_alike is None:
            if isinstance(x, FakeTensor) or x.is_meta:
                return shortening_mode() is not None  # there is nothing to try with
            self.treats_items_alike = self._try_two_items(x, leaves, spec, prompt)
        return self.treats_items_alike

    @torch.no_grad()
    def _try_two_items(self, x: Tensor, leaves: list[Any], spec: Any, prompt: Tensor | None) -> bool:
        """Whether two items give together what they give one by one, without dropout, and stay as they are."""
        unchanged = True

        def output_of(items: Tensor) -> tuple[list[Any], Any]:
            nonlocal unchanged
            items = items.clone()  # the block may write over what it gets
            args, kwargs = tree_unflatten([items if t is x else t for t in leaves], spec)
            version = items._version
            found = tree_flatten(self._run(*_prompted(args, prompt), **kwargs))
            unchanged = unchanged and items._version == version
            return found

        # a forward in eval would have bitsandbytes repack weights in codes, which cannot be trained on afterwards
        training = [module for module in self.block.modules() if module.training and not _is_quantized(module)]
        try:
            for module in training:
                module.training = False
            (both, shape), (first, one), (second, two) = output_of(x[:2]), output_of(x[:1]), output_of(x[1:2])
        finally:
            for module in training:
                module.training = True
        return unchanged and shape == one == two and all(map(_agree, both, first, second))


def _is_quantized(module: nn.Module) -> bool:
    return not all(p is None or p.is_floating_point() for p in module._parameters.values())


def _is_watched(module: nn.Module) -> bool:
    """Whether the module has hooks of others, which expect a call for each batch."""
    return not isinstance(vars(module).get("forward"), BlockForward) and _has_hooks_of_others(module)


def _has_hooks_of_others(module: nn.Module) -> bool:
    """On a block itself they run outside of its pieces."""
    return any(map(_is_of_others, (*module._forward_hooks.values(), *module._forward_pre_hooks.values())))


def _may_be_seen(block: nn.Module) -> bool:
    """Whether others look at what goes into the block and what comes out of it."""
    global_hooks = *_global_forward_hooks.values(), *_global_forward_pre_hooks.values()
    return _has_hooks_of_others(block) or any(map(_is_of_others, global_hooks))


def _is_of_others(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or "").partition(".")[0] != _PACKAGE


def _prompted(args: tuple[Any, ...], prompt: Tensor | None) -> tuple[Any, ...]:
    return args if prompt is None else (args[0] + prompt, *args[1:])


def takes_prompt(block: nn.Module, x: Tensor, args: tuple[Any, ...]) -> bool:
    """Whether the block's forward may be left to add a prompt to its input, since nobody looks at the input before."""
    if torch.compiler.is_compiling() or not args or args[0] is not x:
        return False
    return isinstance(vars(block).get("forward"), BlockForward) and not _may_be_seen(block)


def leave_prompt(block: nn.Module, prompt: Tensor | None) -> None:
    """Has the forward that this thread is about to call add a prompt (1, ...) to its first argument; None: nothing."""
    forward = vars(block).get("forward")
    if isinstance(forward, BlockForward):
        forward.left.prompt = prompt


_JOINED_BY = "_s2a_joined_by"
"""Attribute of a tensor that was joined from pieces: number of the block, and the tensor's version."""


def takes_joined(block: nn.Module, output: Tensor) -> bool:
    """Whether this output of a block was just joined from its pieces and nobody else can have seen it.

    Only the first question about an output is answered yes: whoever asks may write over it.
    """
    if torch.compiler.is_compiling():
        return False  # blocks are not cut then
    mark = vars(output).pop(_JOINED_BY, None)
    return (
        mark is not None
        and mark == (id(block), output._version)
        and isinstance(vars(block).get("forward"), BlockForward)  # not wrapped by others
        and not _may_be_seen(block)
    )


def _agree(both: Any, first: Any, second: Any) -> bool:
    if not isinstance(both, Tensor):
        return type(both) is type(first) is type(second) and isinstance(both, _PLAIN)
    if not both.dim() or first.shape != second.shape or both.shape != (2 * first.shape[0], *first.shape[1:]):
        return False
    expected = torch.cat([first, second])
    if not both.is_floating_point():
        return torch.equal(both, expected)
    error, scale = (both - expected).float().norm(), both.float().norm()
    return bool(error <= max(1e-4, 4 * torch.finfo(both.dtype).eps) * scale)


def install(block: nn.Module, interceptor: ActivationInterceptor, mixes_items: MixesItems) -> None:
    """Puts a `BlockForward` in the place of the block's `forward`; a second call does nothing."""
    if not isinstance(vars(block).get("forward"), BlockForward):
        block.forward = BlockForward(block, interceptor, mixes_items)


def remove(block: nn.Module) -> None:
    """Undoes `install`."""
    forward = vars(block).get("forward")
    if isinstance(forward, BlockForward):
        del block.forward
        if forward.replaced is not None:
            block.forward = forward.replaced
