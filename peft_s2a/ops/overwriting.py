"""Results that take the place of an input that nobody needs any more.

An activation function needs its input for nothing but its result, but in Python it cannot be seen whether anybody else
will look at the input again: the caller's variable still holds it. So what came straight from a linear layer is
overwritten, and while anything still holds it the layer's own input is kept at hand: whoever does look again gets the
layer's output made anew, bit for bit.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..codecs.chunked import chunk_bounds
from .memory_order import same_memory

Elementwise = Callable[[Tensor], Tensor]


def write_over(input: Tensor, function: Elementwise) -> Tensor:
    """`function(input)` in the memory of a contiguous `input`, as a tensor of its own (`same_memory`)."""
    output = same_memory(input)
    flat = output.view(-1)
    for start, stop in chunk_bounds(flat.numel(), flat.device, 1):
        flat[start:stop] = function(flat[start:stop])
    return output


def applied(ctx: Any, function: Elementwise, input: Tensor) -> Tensor:
    """`function(input)` in the forward of an autograd function; autograd is told if it worked in place."""
    output = function(input)
    if output is input:
        ctx.mark_dirty(input)
        return input  # by this name a tracer knows it again
    return output


@dataclass(frozen=True)
class _Offer:
    """A linear layer's output, and what it takes to make it again."""

    output: weakref.ref[Tensor]
    input: weakref.ref[Tensor]
    versions: tuple[int, int]
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class _Overwritten:
    output: weakref.ref[Tensor]
    input: Tensor
    version: int
    weight: Tensor
    bias: Tensor | None

    def restore(self) -> None:
        output = self.output()
        if output is None:
            return
        if self.input._version != self.version:
            raise RuntimeError(
                "The output of a linear layer is used after its activation function, and the layer's input was changed "
                "in place in between: clone one of them before."
            )
        with torch.no_grad():
            parts = (None if t is None else t.to(output.dtype) for t in (self.input, self.weight, self.bias))
            output.data = torch.nn.functional.linear(*parts)  # type: ignore[arg-type]


class _State(threading.local):
    def __init__(self) -> None:
        self.offer: _Offer | None = None
        self.overwritten: list[_Overwritten] = []


class Overwriting:
    """What may be overwritten, and what has been, in one forward pass of one thread."""

    def __init__(self) -> None:
        self._state = _State()

    def __reduce__(self) -> tuple[type[Overwriting], tuple[()]]:
        return Overwriting, ()

    def offer(self, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Tells that `output = linear(input, weight, bias)` has just been made."""
        if output.is_contiguous() and not output.is_inference() and not input.is_inference():
            versions = output._version, input._version
            self._state.offer = _Offer(weakref.ref(output), weakref.ref(input), versions, weight.detach(), bias)

    def take(self, tensor: Tensor) -> bool:
        """Whether the caller, an elementwise operator, may write over `tensor`; it must do so then."""
        offer, self._state.offer = self._state.offer, None
        if offer is None or offer.output() is not tensor:
            return False
        input = offer.input()
        if input is None or (tensor._version, input._version) != offer.versions:
            return False
        state = self._state
        bias = None if offer.bias is None else offer.bias.detach()
        gone = weakref.ref(tensor, lambda ref: state.overwritten.remove(entry) if entry in state.overwritten else None)
        entry = _Overwritten(gone, input, offer.versions[1], offer.weight, bias)
        state.overwritten.append(entry)
        return True

    def withdraw(self, tensors: Iterable[Any]) -> None:
        """Tells that a function has taken these: a tensor among them is no longer free to be overwritten."""
        offer = self._state.offer
        if offer is not None:
            output = offer.output()
            if output is None or any(t is output for t in tensors):
                self._state.offer = None

    def restore(self, tensors: Iterable[Any] | None = None) -> None:
        """Puts overwritten tensors back, those among `tensors` or, with `None`, all that are still held."""
        if self._state.overwritten:
            wanted = None if tensors is None else {id(t) for t in tensors if isinstance(t, Tensor)}
            for entry in list(self._state.overwritten):
                output = entry.output()
                if output is not None and (wanted is None or id(output) in wanted):
                    self._state.overwritten.remove(entry)
                    entry.restore()
        if tensors is None:
            self._state.offer = None
