"""What came out of a case: it works, or it is refused for a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.integrations.setting import Refused, Setting

REFUSALS = (Refused, ValueError, TypeError, NotImplementedError)
"""How the library, PEFT and transformers refuse; whatever else a case raises is a failure."""


def outcome_of(case: Callable[[Setting], None], architecture: str) -> dict[str, str]:
    """`{"outcome": "works"}`, or `"refused"` with the first sentence of the reason."""
    try:
        case(Setting.of(architecture))
    except REFUSALS as error:
        return {"outcome": "refused", "reason": first_sentence(str(error))}
    return {"outcome": "works", "reason": ""}


def first_sentence(text: str) -> str:
    return " ".join(text.split()).partition(". ")[0].rstrip(".")


def key_of(record: dict[str, Any]) -> tuple[str, str]:
    return record["integration"], record["architecture"]
