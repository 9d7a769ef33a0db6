"""The settings of S2A that the benchmarks compare, as data: name and fields of `S2AConfig`.

A setting whose fields the installed library does not have is left out, with a note on stderr.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import Any

from peft_s2a import S2AConfig

Fields = dict[str, Any]

REBUILT = ("gelu", "silu", "pointwise", "attention", "product")
"""Kinds of operators whose inputs can be rebuilt."""

POLICIES: dict[str, Fields] = {
    "keep": {"activation_bits": 4},
    "keep, compiled": {"activation_bits": 4, "activation_backend": "compile"},
    "rebuild attention": {"activation_policy": {"attention": "rebuild"}},
    "rebuild attention, 6 bits": {"activation_policy": {"attention": "rebuild"}, "activation_bits": {"source": 6}},
    "rebuild attention, 6 bits, compiled": {
        "activation_policy": {"attention": "rebuild"},
        "activation_bits": {"source": 6},
        "activation_backend": "compile",
    },
    "rebuild": {"activation_policy": "rebuild"},
    "rebuild, 6 bits": {"activation_policy": "rebuild", "activation_bits": {"source": 6}},
    "recompute": {"activation_policy": "recompute"},
    "recompute, 8 bits": {"activation_policy": "recompute", "activation_bits": 8},
    "recompute and rebuild": {"activation_policy": dict.fromkeys(REBUILT, "rebuild") | {"block": "recompute"}},
}
"""Where nothing is said, codes and inputs of recomputed blocks have 4 bits; normalised inputs that others are rebuilt
from, and what is kept inside a recomputed block, have 8."""


def available(policies: dict[str, Fields] | None = None) -> dict[str, Fields]:
    """The policies (all by default) whose fields the library knows."""
    known = {field.name for field in fields(S2AConfig)}
    found = {}
    for name, config in (POLICIES if policies is None else policies).items():
        unknown = sorted(set(config) - known)
        if unknown:
            print(f"S2A {name}: left out, the library has no {', '.join(unknown)}", file=sys.stderr)
        else:
            found[name] = config
    return found
