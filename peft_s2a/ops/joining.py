"""Takes a tensor apart into pieces of the batch, and joins what is made of them, without a second copy of either.

`torch.split` and `torch.cat` hold all pieces beside the whole: of outputs in forward, of gradients in backward. Here a
piece is written to its place as soon as it is there. What autograd sees behind it is a token: a tensor of the piece's
shape with one element of memory, whose gradient is a piece of the whole's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..pieces import shortening_mode
from .memory_order import channels_last, shares_memory
from .ownership import owned, storage_count

Span = tuple[int, int]
"""First item of a piece, and the one behind its last."""


def _token(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor of this shape with one element of memory: a number, since checks for NaN look at it."""
    return like.new_zeros(1).expand(tuple(shape))


class Whole:
    """A tensor that is made piece by piece: an output, or the gradient of an input.

    The latter may be made in lent memory, which pieces of another gradient are still read from. Who holds that memory
    is counted: `tensor`, the views that are still to be read, the piece that is being put if it is a view itself.
    Anybody else makes the memory unfit, and the tensor moves.

    Attributes:
        tensor: what has been made so far.
        unread: views of `tensor`, one for each piece of its old content that is still to be read.
    """

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items
        self.tensor: Tensor | None = None
        self.unread = 0
        self.lent = False  # nobody else can hold memory that was made here

    def put(self, piece: Tensor, span: Span) -> None:
        """Writes a piece to its place."""
        if self.tensor is None:
            self.tensor = self._empty(piece)
        elif self.lent and self._is_seen_by_others(piece):
            old, self.tensor, self.unread, self.lent = self.tensor, self._empty(piece), 0, False
            self.tensor.copy_(old)
        place = self.tensor[span[0] : span[1]]
        if not shares_memory(piece, place):
            place.copy_(piece)
        elif (piece.data_ptr(), piece.stride()) != (place.data_ptr(), place.stride()):
            place.copy_(piece.clone())  # a view of the place in another order, say

    def _empty(self, piece: Tensor) -> Tensor:
        shape = (self.num_items, *piece.shape[1:])
        order = channels_last(piece) or torch.contiguous_format  # as `torch.cat` has it
        made = torch.empty(shape, dtype=piece.dtype, device=piece.device, memory_format=order)
        mode = shortening_mode()
        if mode is not None:
            mode.made_at_once(made)
        return made

    def _is_seen_by_others(self, piece: Tensor) -> bool:
        """Whether somebody else holds memory of `tensor`: a gradient that was handed on as it is, say."""
        assert self.tensor is not None
        alone = storage_count(torch.empty_like(piece[:0]))
        return storage_count(self.tensor) > alone + self.unread + shares_memory(piece, self.tensor)

    def take(self) -> Tensor | None:
        """The tensor, which is forgotten here."""
        made, self.tensor, self.unread, self.lent = self.tensor, None, 0, False
        return made


class _Split(torch.autograd.Function):
    """Tokens of all pieces of `input`; its gradient is what they have put into `gradient`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, gradient: Whole, spans: Sequence[Span]) -> tuple[Tensor, ...]:
        ctx.gradient, ctx.spans = gradient, spans
        ctx.set_materialize_grads(False)
        return tuple(_token((stop - start, *input.shape[1:]), input) for start, stop in spans)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *tokens: Tensor | None) -> tuple[Tensor | None, None, None]:
        whole = ctx.gradient.take()
        if whole is None:
            return None, None, None
        for (start, stop), token in zip(ctx.spans, tokens, strict=True):
            if token is None:
                whole[start:stop] = 0
        return whole, None, None


class _Enter(torch.autograd.Function):
    """The piece behind a token; its gradient is put into the whole one."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, source: Tensor, gradient: Whole, span: Span) -> Tensor:
        ctx.gradient, ctx.span = gradient, span
        return source[span[0] : span[1]]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.gradient.put(grad_output, ctx.span)
        return _token(grad_output.shape, grad_output), None, None, None


class _Leave(torch.autograd.Function):
    """The token of a piece that is put into the whole output."""

    @staticmethod
    def forward(ctx: Any, piece: Tensor, output: Output, span: Span) -> Tensor:
        ctx.output = output
        output.put(piece, span)
        return _token(piece.shape, piece)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        ctx.output.read()
        return grad_output, None, None


class _Join(torch.autograd.Function):
    """The whole output behind its tokens."""

    @staticmethod
    def forward(ctx: Any, output: Output, spans: Sequence[Span], *tokens: Tensor) -> Tensor:
        ctx.output, ctx.spans = output, spans
        whole = output.take()
        assert whole is not None
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[2:]
        ctx.output.lends = False
        if owned(grad_output):
            ctx.output.lend(grad_output, sum(needs))
        pieces = zip(ctx.spans, needs, strict=True)
        return None, None, *(grad_output[start:stop] if need else None for (start, stop), need in pieces)


class Output(Whole):
    """A whole output. The memory of its gradient may become that of the input's.

    Args:
        gradient: the input's gradient, and its shape and dtype, if there is one.
    """

    def __init__(self, num_items: int, gradient: Whole | None, like: Tensor) -> None:
        super().__init__(num_items)
        self.gradient, self.shape, self.dtype = gradient, like.shape, like.dtype
        self.lends = False

    def lend(self, own_gradient: Tensor, num_pieces: int) -> None:
        """Offers the memory of a gradient that belongs to nobody else and is read in so many pieces."""
        fits = (own_gradient.shape, own_gradient.dtype) == (self.shape, self.dtype)
        self.lends = fits and self.gradient is not None and self.gradient.tensor is None
        if self.gradient is not None and self.lends:
            self.gradient.tensor, self.gradient.unread, self.gradient.lent = own_gradient, num_pieces, True

    def read(self) -> None:
        """Says that a piece of the gradient has gone where it is needed."""
        if self.gradient is not None and self.lends and self.gradient.unread:
            self.gradient.unread -= 1


def in_pieces(run: Callable[[Tensor], Any], input: Tensor, size: int) -> Any:
    """What `run` makes of pieces of `size` items each, joined.

    Args:
        run: gives a tensor or a tree of them, each with a dimension of items in front, and other things, which are
            those of the first piece.
    """
    spans = [(start, min(start + size, len(input))) for start in range(0, len(input), size)]
    gradient = Whole(len(input)) if input.requires_grad else None
    if gradient is None:
        pieces = iter(input.split(size))
    else:
        source = input.detach()
        tokens = _Split.apply(input, gradient, spans)
        pieces = (_Enter.apply(token, source, gradient, span) for token, span in zip(tokens, spans, strict=True))
    outputs: list[Output] = []
    left: list[list[Tensor]] = []
    first: list[Any] = []
    spec = None
    for piece, span in zip(pieces, spans, strict=True):
        leaves, spec = tree_flatten(run(piece))
        if not first:
            first = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            outputs = [Output(len(input), gradient, input) for _ in leaves]
            left = [[] for _ in leaves]
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                left[place].append(_Leave.apply(leaf, outputs[place], span))
        del leaves, leaf, piece
    assert spec is not None
    joined = (
        _Join.apply(output, spans, *tokens) if tokens else other
        for output, tokens, other in zip(outputs, left, first, strict=True)
    )
    return tree_unflatten(list(joined), spec)
