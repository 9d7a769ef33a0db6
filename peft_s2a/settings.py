"""How the activations of one adapter are kept: bits per operator kind and the backend of the codecs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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

POLICIES = ("keep", "rebuild", "recompute", "auto")

REBUILT_KINDS = ("gelu", "silu", "pointwise", "attention", "product")
"""Kinds whose inputs can be rebuilt from a normalised input that is kept anyway."""

BACKENDS = ("auto", "eager", "compile")
"""How the kernels run: as plain PyTorch, compiled by `torch.compile`, or (`"auto"`) compiled on CUDA alone. A
`torch.compile(model)` traces the plain source together with the model, whatever is set."""

Rounding = Literal["nearest", "stochastic"]
ROUNDINGS = ("nearest", "stochastic")
"""How a number between two codes is rounded."""


PRECISIONS = ("auto", "medium", "highest")
"""How products of backward with frozen float32 weights are taken, in the words of `torch.set_float32_matmul_precision`:
`"medium"` in bfloat16 where the device multiplies that faster, `"highest"` in float32, `"auto"` as `"medium"` where
something is kept in codes."""


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
        instances: bits of single operators by name (`table/calls.py`), which go before those of their kind, 0 for one
            that is rebuilt; None where kinds alone count: names are then not made.
        optional: kinds of `REBUILT_KINDS` whose operators may be rebuilt one by one, where `allocated` says so.
        bits_again: bits, in place of `bits`, inside a block that runs again in backward.
        precision: of products in backward, one of `PRECISIONS`.
    """

    bits: Mapping[str, int | None] = field(default_factory=dict)
    backend: str = "auto"
    rounding: Rounding = "nearest"
    rebuilt: frozenset[str] = frozenset()
    recompute_blocks: bool = False
    instances: Mapping[str, int | None] | None = None
    optional: frozenset[str] = frozenset()
    bits_again: Mapping[str, int | None] = field(default_factory=dict)
    precision: str = "auto"

    @classmethod
    def from_config(
        cls,
        activation_bits: int | str | Mapping[str, int | None] | None,
        activation_backend: str = "auto",
        activation_policy: str | Mapping[str, str] = "keep",
        activation_rounding: Rounding = "nearest",
        backward_precision: str = "auto",
    ) -> ActivationSettings:
        """Settings from the fields of `S2AConfig`.

        A number holds for every kind of operator but those of `WIDE_KINDS`, which have 8 bits. Where blocks are
        recomputed it holds for their inputs too: what operators inside them keep lives while one block runs again, and
        has 8 bits. A mapping sets some kinds and leaves the others as the number 4 does; `None` is exact.

        Raises:
            ValueError: for bits outside `BIT_LEVELS`, an unknown kind, backend, policy, rounding or precision.
        """
        rebuilt, optional, recompute_blocks = _parse_policy(activation_policy)
        if activation_backend not in BACKENDS:
            raise ValueError(f"activation_backend={activation_backend!r} is not one of {', '.join(BACKENDS)}.")
        if activation_rounding not in ROUNDINGS:
            raise ValueError(f"activation_rounding={activation_rounding!r} is not one of {', '.join(ROUNDINGS)}.")
        if backward_precision not in PRECISIONS:
            raise ValueError(f"backward_precision={backward_precision!r} is not one of {', '.join(PRECISIONS)}.")
        common = 4 if isinstance(activation_bits, Mapping) else activation_bits
        wide = None if common is None else 8
        bits: dict[str, Any] = {
            kind: wide if kind in WIDE_KINDS and not (kind == "block" and recompute_blocks) else common
            for kind in OPERATOR_KINDS
        }
        again: dict[str, Any] = dict.fromkeys(OPERATOR_KINDS, wide) if recompute_blocks else {}
        if isinstance(activation_bits, Mapping):
            known = (*OPERATOR_KINDS, *ATTENTION_PARTS)
            unknown = sorted(set(activation_bits) - set(known))
            if unknown:
                raise ValueError(f"activation_bits has unknown operator kinds {unknown}; known are {', '.join(known)}.")
            bits.update(activation_bits)
            again.update(activation_bits if recompute_blocks else {})
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
        return cls(
            bits,
            activation_backend,
            activation_rounding,
            rebuilt,
            recompute_blocks,
            optional=optional,
            bits_again=again,
            precision=backward_precision,
        )

    def bits_of(self, kind: str, again: bool = False) -> int | None:
        """Bits of the operators of a kind, or of a part of an attention; `again`: in a block that runs again."""
        bits = self.bits_again or self.bits if again else self.bits
        return bits.get("attention" if kind in ATTENTION_PARTS and kind not in bits else kind)

    @property
    def rebuilds(self) -> bool:
        """Whether some operator is rebuilt or may be."""
        return bool(self.rebuilt or self.optional)

    @property
    def short_products(self) -> bool:
        """Whether products of backward may be taken in bfloat16."""
        if self.precision != "auto":
            return self.precision == "medium"
        return any(bits is not None for bits in self.bits.values())

    def allocated(self, bits: Mapping[str, int]) -> ActivationSettings:
        """These settings with bits of groups, by kind or by name of an operator; those with 0 bits are rebuilt.

        An operator of a kind that is rebuilt keeps codes all the same where its input's origin is not known; they have
        the bits of these settings.
        """
        kinds = {name: b for name, b in bits.items() if ":" not in name}
        instances: dict[str, int | None] = {name: b for name, b in bits.items() if ":" in name}
        again = {rebuilt_kind(kind) for kind, b in kinds.items() if not b}
        return replace(
            self,
            bits={**self.bits, **{kind: b or self.bits_of(kind) for kind, b in kinds.items()}},
            rebuilt=self.rebuilt | again,
            instances=instances or None,
        )


def rebuilt_kind(kind: str) -> str:
    """The kind of `REBUILT_KINDS` that a kind belongs to: a part of an attention is rebuilt as one."""
    return "attention" if kind in ATTENTION_PARTS else kind


def _parse_policy(policy: str | Mapping[str, str]) -> tuple[frozenset[str], frozenset[str], bool]:
    """Kinds that are rebuilt, those that may be, and whether blocks are recomputed."""
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(f"activation_policy={policy!r} is not one of {', '.join(POLICIES)}.")
        every, none = frozenset(REBUILT_KINDS), frozenset[str]()
        return every if policy == "rebuild" else none, every if policy == "auto" else none, policy == "recompute"
    choices = dict.fromkeys(REBUILT_KINDS, ("keep", "rebuild", "auto")) | {"block": ("keep", "recompute")}
    for kind, value in policy.items():
        if kind not in choices:
            raise ValueError(f"activation_policy has the unknown kind {kind!r}; known are {', '.join(choices)}.")
        if value not in choices[kind]:
            raise ValueError(
                f"activation_policy for {kind!r} is {value!r}; it can be {' or '.join(map(repr, choices[kind]))}."
            )
    rebuilt, optional = (frozenset(k for k, value in policy.items() if value == name) for name in ("rebuild", "auto"))
    return rebuilt, optional, policy.get("block") == "recompute"
