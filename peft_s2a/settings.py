"""How the activations of one adapter are kept: bits per operator kind and the backend of the codecs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

BIT_LEVELS = (1, 2, 3, 4, 6, 8)
"""Numbers of bits a code can have."""

OPERATOR_KINDS = (
    "gelu",
    "silu",
    "pointwise",
    "norm",
    "attention",
    "softmax",
    "linear",
    "product",
    "source",
    "block",
    "other",
)
"""Groups of operators whose bits can be set apart; the names are the keys of `activation_bits`.

`"source"`: normalised inputs that others are rebuilt from, in place of `"norm"` where something is rebuilt; `"block"`:
inputs of blocks that are recomputed; `"other"`: what torch's own functions save.
"""

ATTENTION_PARTS = ("query", "key", "value")
"""What an attention keeps; each has the bits of `"attention"` unless a mapping sets its own."""

WIDE_KINDS = ("source", "block", "other")
"""Kinds with 8 bits unless a mapping says otherwise: much else is made from them, or little is known of them."""

POLICIES = ("keep", "rebuild", "recompute")

REBUILT_KINDS = ("gelu", "silu", "pointwise", "attention", "product")
"""Kinds whose inputs can be rebuilt from a normalised input that is kept anyway."""

BACKENDS = ("auto", "eager", "compile")
"""How the kernels run: as plain PyTorch, compiled by `torch.compile`, or (`"auto"`) compiled on CUDA alone. A
`torch.compile(model)` traces the plain source together with the model, whatever is set."""

Rounding = Literal["nearest", "stochastic"]
ROUNDINGS = ("nearest", "stochastic")
"""How a number between two codes is rounded."""


@dataclass(frozen=True)
class ActivationSettings:
    """What the operators of one adapter keep for backward.

    Args:
        bits: bits per element for each operator kind of `OPERATOR_KINDS`; `None` for a kind leaves that kind to torch,
            exactly. Operators that are exact in fewer bits (ReLU, dropout, frozen convolution) are not listed: they
            are always on.
        backend: `"auto"`, `"eager"` or `"compile"`.
        rounding: `"nearest"` or `"stochastic"`.
        rebuilt: kinds of `REBUILT_KINDS` that keep how their input is rebuilt, where that is known, in place of codes.
        recompute_blocks: whether a block keeps its input alone and runs again in backward.
        instances: bits of single operators by name (`table/calls.py`), which go before those of their kind; None where
            kinds alone count: names are then not made.
    """

    bits: Mapping[str, int | None] = field(default_factory=dict)
    backend: str = "auto"
    rounding: Rounding = "nearest"
    rebuilt: frozenset[str] = frozenset()
    recompute_blocks: bool = False
    instances: Mapping[str, int | None] | None = None

    @classmethod
    def from_config(
        cls,
        activation_bits: int | str | Mapping[str, int | None] | None,
        activation_backend: str = "auto",
        activation_policy: str | Mapping[str, str] = "keep",
        activation_rounding: Rounding = "nearest",
    ) -> ActivationSettings:
        """Settings from the fields of `S2AConfig`.

        A number holds for every kind of operator but those of `WIDE_KINDS`, which have 8 bits. Where blocks are
        recomputed it holds for their inputs: what operators keep lives while one block runs, and has 8 bits. A mapping
        sets some kinds and leaves the others as the number 4 does; `None` is exact.

        Raises:
            ValueError: for bits outside `BIT_LEVELS`, an unknown kind, backend, policy or rounding.
        """
        rebuilt, recompute_blocks = _parse_policy(activation_policy)
        if activation_backend not in BACKENDS:
            raise ValueError(f"activation_backend={activation_backend!r} is not one of {', '.join(BACKENDS)}.")
        if activation_rounding not in ROUNDINGS:
            raise ValueError(f"activation_rounding={activation_rounding!r} is not one of {', '.join(ROUNDINGS)}.")
        common = 4 if isinstance(activation_bits, Mapping) else activation_bits
        bits: dict[str, Any] = {}
        for kind in OPERATOR_KINDS:
            is_wide = (kind != "block") if recompute_blocks else (kind in WIDE_KINDS)
            bits[kind] = 8 if is_wide and common is not None else common
        if isinstance(activation_bits, Mapping):
            known = (*OPERATOR_KINDS, *ATTENTION_PARTS)
            unknown = sorted(set(activation_bits) - set(known))
            if unknown:
                raise ValueError(f"activation_bits has unknown operator kinds {unknown}; known are {', '.join(known)}.")
            bits.update(activation_bits)
            if "auto" in bits.values():
                raise ValueError(
                    "activation_bits='auto' stands for all kinds of operators together: set it in place of a mapping, "
                    "or give a number for each kind."
                )
        for kind, num_bits in bits.items():
            if num_bits is not None and (isinstance(num_bits, bool) or num_bits not in BIT_LEVELS):
                raise ValueError(
                    f"activation_bits for {kind!r} is {num_bits!r}; use one of {', '.join(map(str, BIT_LEVELS))}, "
                    "or None to keep exact activations."
                )
        return cls(bits, activation_backend, activation_rounding, rebuilt, recompute_blocks)

    def bits_of(self, kind: str) -> int | None:
        """Bits of the operators of a kind, or of a part of an attention."""
        return self.bits.get("attention" if kind in ATTENTION_PARTS and kind not in self.bits else kind)


def _parse_policy(policy: str | Mapping[str, str]) -> tuple[frozenset[str], bool]:
    """Kinds that are rebuilt, and whether blocks are recomputed."""
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(f"activation_policy={policy!r} is not one of {', '.join(POLICIES)}.")
        return frozenset(REBUILT_KINDS if policy == "rebuild" else ()), policy == "recompute"
    choices = dict.fromkeys(REBUILT_KINDS, ("keep", "rebuild")) | {"block": ("keep", "recompute")}
    for kind, value in policy.items():
        if kind not in choices:
            raise ValueError(f"activation_policy has the unknown kind {kind!r}; known are {', '.join(choices)}.")
        if value not in choices[kind]:
            raise ValueError(
                f"activation_policy for {kind!r} is {value!r}; it can be {' or '.join(map(repr, choices[kind]))}."
            )
    rebuilt = frozenset(kind for kind, value in policy.items() if value == "rebuild")
    return rebuilt, policy.get("block") == "recompute"
