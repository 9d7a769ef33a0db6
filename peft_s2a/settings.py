"""How the activations of one adapter are kept: bits per operator kind and the backend of the codecs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

BIT_LEVELS = (1, 2, 3, 4, 6, 8)
"""Numbers of bits a code can have."""

OPERATOR_KINDS = ("gelu", "silu", "pointwise", "norm", "attention", "softmax", "linear", "product", "other")
"""Groups of operators whose bits can be set apart; the names are the keys of `activation_bits`."""

BACKENDS = ("auto", "eager")
"""Both run the operators as plain PyTorch; `torch.compile(model)` traces them together with the model."""


@dataclass(frozen=True)
class ActivationSettings:
    """What the operators of one adapter keep for backward.

    Args:
        bits: bits per element for each operator kind of `OPERATOR_KINDS`; `None` for a kind leaves that kind to torch,
            exactly. Operators that are exact in fewer bits (ReLU, dropout, frozen convolution) are not listed: they
            are always on.
        backend: `"auto"` or `"eager"`.
    """

    bits: Mapping[str, int | None] = field(default_factory=dict)
    backend: str = "auto"

    @classmethod
    def from_config(
        cls, activation_bits: int | Mapping[str, int | None] | None, activation_backend: str = "auto"
    ) -> ActivationSettings:
        """Settings from the two fields of `S2AConfig`.

        A number holds for every kind of operator; a mapping sets some kinds and leaves the others at 4 bits; `None` is
        exact. What operators outside the table save (`"other"`), where it is coded, has 8 bits unless a mapping says
        otherwise.

        Raises:
            ValueError: for bits outside `BIT_LEVELS`, an unknown kind or an unknown backend.
        """
        if activation_backend not in BACKENDS:
            raise ValueError(f"activation_backend={activation_backend!r} is not one of {', '.join(BACKENDS)}.")
        common = 4 if isinstance(activation_bits, Mapping) else activation_bits
        bits: dict[str, int | None] = {}
        for kind in OPERATOR_KINDS:
            bits[kind] = common
        if common is not None:
            bits["other"] = 8
        if isinstance(activation_bits, Mapping):
            unknown = sorted(set(activation_bits) - set(OPERATOR_KINDS))
            if unknown:
                raise ValueError(
                    f"activation_bits has unknown operator kinds {unknown}; known are {', '.join(OPERATOR_KINDS)}."
                )
            bits.update(activation_bits)
        for kind, num_bits in bits.items():
            if num_bits is not None and (isinstance(num_bits, bool) or num_bits not in BIT_LEVELS):
                raise ValueError(
                    f"activation_bits for {kind!r} is {num_bits!r}; use one of {', '.join(map(str, BIT_LEVELS))}, "
                    "or None to keep exact activations."
                )
        return cls(bits=bits, backend=activation_backend)
