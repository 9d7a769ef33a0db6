"""How an activation came from normalised inputs that are kept anyway, so that it is made again and not kept.

Queries, keys, values and the input of a GELU are linear images of a normalised input. A `Node` remembers one step of
the way; a `Program` is the whole way to one or several tensors, for backward. Steps treat the items of a batch alike,
so a program can make some items at a time; where the items lie in each tensor is followed through the views.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..codecs.base import Codec, Kept
from ..codecs.chunked import decode_range
from .short_product import short_product

Span = tuple[int, int]


@dataclass(frozen=True)
class Items:
    """Where the items of a batch lie in a tensor: `count * factor` positions of dimension `dim`, item by item."""

    count: int
    dim: int = 0
    factor: int = 1


class Step(Protocol):
    """One step of a program; hashable state, tensors come in from outside."""

    def __call__(self, inputs: Sequence[Tensor], leaves: Sequence[Tensor], span: Span | None) -> Tensor:
        """The step's result, of the items `[start, stop)` of a span or of all."""
        ...


@dataclass(frozen=True, eq=False)
class Node:
    """A tensor that can be made again.

    Attributes:
        step: how, from `parents` and `leaves`.
        parents: nodes of the step's inputs.
        leaves: tensors that are kept, or that live anyway (weights).
        items: where the items of the batch lie; `None` where that is lost: only the whole can be made.
    """

    step: Step
    parents: tuple[Node, ...]
    leaves: tuple[Tensor, ...]
    shape: torch.Size
    dtype: torch.dtype
    items: Items | None


@dataclass(frozen=True)
class Instruction:
    """`registers[i] = step(registers[inputs], leaves)`; `last` are the registers that nobody needs afterwards."""

    step: Step
    inputs: tuple[int, ...]
    leaves: tuple[int, ...]
    last: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """The way to some tensors, without the tensors at its leaves.

    Attributes:
        count: items of the batch, if all of it can be made a few items at a time, else `None`.
        outputs: registers of the results.
        items: where the items lie in each result.
    """

    instructions: tuple[Instruction, ...]
    outputs: tuple[int, ...]
    items: tuple[Items | None, ...]
    count: int | None

    @torch.no_grad()
    def run(self, leaves: Sequence[Tensor], span: Span | None = None) -> list[Tensor]:
        """The tensors again, from what `compile_program` gave out; of the items `[start, stop)` with a span."""
        registers: list[Tensor | None] = []
        for instruction in self.instructions:
            inputs = [registers[i] for i in instruction.inputs]
            registers.append(instruction.step(inputs, [leaves[i] for i in instruction.leaves], span))  # type: ignore[arg-type]
            del inputs
            for i in instruction.last:
                registers[i] = None
        return [registers[i] for i in self.outputs]  # type: ignore[misc]


def compile_program(nodes: Sequence[Node]) -> tuple[Program, list[Tensor]]:
    """The program that makes all of `nodes`, common steps once, and its leaves."""
    order = numbered(nodes)
    last_use = {order[node]: math.inf for node in nodes}
    for node, index in reversed(order.items()):
        for parent in node.parents:
            last_use.setdefault(order[parent], index)
    leaves: list[Tensor] = []
    places: dict[int, int] = {}
    instructions = []
    for node, index in order.items():
        for leaf in node.leaves:
            if id(leaf) not in places:
                places[id(leaf)] = len(leaves)
                leaves.append(leaf)
        inputs = tuple(order[parent] for parent in node.parents)
        last = tuple({i for i in inputs if last_use[i] == index})
        instructions.append(Instruction(node.step, inputs, tuple(places[id(leaf)] for leaf in node.leaves), last))
    counts = {None if node.items is None else node.items.count for node in order}
    program = Program(
        tuple(instructions),
        tuple(order[node] for node in nodes),
        tuple(node.items for node in nodes),
        counts.pop() if len(counts) == 1 else None,
    )
    return program, leaves


def numbered(nodes: Sequence[Node]) -> dict[Node, int]:
    """Numbers of the nodes and of all that they are made from, parents first."""
    order: dict[Node, int] = {}
    for node in nodes:
        _enter(node, order)
    return order


def _enter(node: Node, order: dict[Node, int]) -> None:
    """Numbers a node, behind its parents."""
    if node not in order:
        for parent in node.parents:
            _enter(parent, order)
        order[node] = len(order)


@dataclass(frozen=True)
class DecodeNormalised:
    """`y = x_hat gamma + beta` from the codes of x_hat: what a norm gave out. Leaves: codes, then gamma and beta.

    `name` is the norm's, where operators have names.
    """

    codec: Codec
    num_kept: int
    shape: tuple[int, ...]
    width: int
    dtype: torch.dtype
    has_weight: bool
    has_bias: bool
    name: str = ""

    def __call__(self, inputs: Sequence[Tensor], leaves: Sequence[Tensor], span: Span | None) -> Tensor:
        kept, parameters = tuple(leaves[: self.num_kept]), list(leaves[self.num_kept :])
        per_item = math.prod(self.shape[1:])
        start, stop = span or (0, self.shape[0])
        first, last = start * per_item, stop * per_item
        aligned = first - first % self.codec.unit
        values = decode_range(self.codec, kept, aligned, last, torch.float32)[first - aligned :].view(-1, self.width)
        if self.has_weight:
            values = values.mul_(parameters.pop(0).reshape(-1))
        if self.has_bias:
            values = values.add_(parameters.pop(0).reshape(-1))
        return values.view(stop - start, *self.shape[1:]).to(self.dtype)


def normalised_node(
    output: Tensor, codec: Codec, kept: Kept, weight: Tensor | None, bias: Tensor | None, name: str = ""
) -> Node:
    """The node of a norm's output; its last dimensions are normalised, the first one counts the items."""
    parameters = tuple(t.detach() for t in (weight, bias) if t is not None)
    width = parameters[0].numel() if parameters else output.shape[-1]
    step = DecodeNormalised(
        codec, len(kept), tuple(output.shape), width, output.dtype, weight is not None, bias is not None, name
    )
    return Node(step, (), (*kept, *parameters), output.shape, output.dtype, Items(output.shape[0]))


@dataclass(frozen=True)
class Linear:
    """A frozen product, in the dtype that the forward pass had. Leaves: weight and bias.

    Args:
        short: whether the input comes out of codes: the product may then be taken in bfloat16 (`short_product`).
    """

    dtype: torch.dtype
    short: bool = False

    def __call__(self, inputs: Sequence[Tensor], leaves: Sequence[Tensor], span: Span | None) -> Tensor:
        if self.short and self.dtype == torch.float32:
            return short_product(inputs[0], leaves[0], leaves[1] if len(leaves) > 1 else None)
        weight, *bias = (t.to(self.dtype) for t in leaves)
        return torch.nn.functional.linear(inputs[0].to(self.dtype), weight, *bias)


@dataclass(frozen=True)
class Elementwise:
    """A function of one value at a time: an activation."""

    function: Any

    def __call__(self, inputs: Sequence[Tensor], leaves: Sequence[Tensor], span: Span | None) -> Tensor:
        result: Tensor = self.function(inputs[0])
        return result


@dataclass(frozen=True)
class Reshape:
    """A new shape; of some items, along the dimension in which they lie."""

    shape: tuple[int, ...]
    items: Items | None

    def __call__(self, inputs: Sequence[Tensor], leaves: Sequence[Tensor], span: Span | None) -> Tensor:
        return inputs[0].reshape(_piece_shape(self.shape, self.items, span))


def _piece_shape(shape: tuple[int, ...], items: Items | None, span: Span | None) -> tuple[int, ...]:
    if span is None or items is None:
        return shape
    return (*shape[: items.dim], (span[1] - span[0]) * items.factor, *shape[items.dim + 1 :])


@dataclass(frozen=True)
class Call:
    """A function that does not touch the dimension of the items; constants among its arguments are leaves."""

    function: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    def __call__(self, inputs: Sequence[Tensor], leaves: Sequence[Tensor], span: Span | None) -> Tensor:
        args = (_fill(value, inputs, leaves, span) for value in self.args)
        result: Tensor = self.function(*args, **{k: _fill(v, inputs, leaves, span) for k, v in self.kwargs})
        return result


@dataclass(frozen=True)
class Input:
    """Place of a parent's tensor among the arguments of a `Call`."""

    index: int


@dataclass(frozen=True)
class Leaf:
    """Place of a constant tensor among the arguments of a `Call`; `items`: where it has the items of the batch."""

    index: int
    items: Items | None


# no recursive closures here: each would be a reference cycle that holds tensors until the garbage is collected


def _fill(value: Any, inputs: Sequence[Tensor], leaves: Sequence[Tensor], span: Span | None) -> Any:
    """The argument of a `Call` with the tensors in their places."""
    if isinstance(value, Input):
        return inputs[value.index]
    if isinstance(value, Leaf):
        return _of_items(leaves[value.index], value.items, span)
    if type(value) in (list, tuple):
        return type(value)(_fill(v, inputs, leaves, span) for v in value)
    return value


def _of_items(tensor: Tensor, items: Items | None, span: Span | None) -> Tensor:
    if items is None or span is None:
        return tensor
    return tensor.narrow(items.dim, span[0] * items.factor, (span[1] - span[0]) * items.factor)


class LineageBook:
    """Nodes of the tensors of one forward pass; a tensor that dies takes its node along."""

    def __init__(self) -> None:
        self._nodes = WeakTensorKeyDictionary()

    def __reduce__(self) -> tuple[type[LineageBook], tuple[()]]:
        return LineageBook, ()

    def put(self, tensor: Tensor, node: Node) -> None:
        """Remembers how `tensor` came about, as long as neither it nor a leaf of the node is changed in place."""
        if not any(t.is_inference() for t in (tensor, *node.leaves)):
            self._nodes[tensor] = node, _versions(tensor, node)

    def get(self, tensor: Tensor) -> Node | None:
        """The tensor's node, unless something was changed in place since."""
        node, versions = self._nodes.get(tensor, (None, None))
        return node if node is not None and versions == _versions(tensor, node) else None


def _versions(tensor: Tensor, node: Node) -> tuple[int, ...]:
    return tuple(t._version for t in (tensor, *node.leaves))
