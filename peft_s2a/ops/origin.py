"""What a tensor's lineage tells without making it again: its sources, the work, whether it carries errors of codes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..codecs.base import IdentityCodec
from .lineage import DecodeNormalised, Linear, Node, numbered


def comes_from_codes(node: Node) -> bool:
    """Whether all that the tensor is made from is decoded, so that it carries the error of codes."""
    if not node.parents:
        return isinstance(node.step, DecodeNormalised) and not isinstance(node.step.codec, IdentityCodec)
    return all(map(comes_from_codes, node.parents))


@dataclass(frozen=True)
class Origin:
    """What a tensor is made from.

    Attributes:
        sources: names of the norms.
        work: multiplications of the products on the way.
    """

    sources: frozenset[str]
    work: int


def origin_of(node: Node) -> Origin:
    """The origin of a tensor; of products that made several tensors at once, its share counts."""
    order = numbered([node])
    size = math.prod(node.shape)
    work = sum(
        min(size, math.prod(n.shape)) * n.leaves[0].shape[1] for n in order if isinstance(n.step, Linear) and n.leaves
    )
    return Origin(frozenset(n.step.name for n in order if isinstance(n.step, DecodeNormalised)), work)
