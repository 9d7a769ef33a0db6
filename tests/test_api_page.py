"""Every public name has its place in the API reference, and a docstring."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import peft_s2a
import peft_s2a.memory

PAGE = (Path(__file__).parent.parent / "docs" / "api.md").read_text(encoding="utf-8")
PUBLIC = [
    *((peft_s2a, name) for name in peft_s2a.__all__ if name != "__version__"),
    *((peft_s2a.memory, name) for name in peft_s2a.memory.__all__),
]


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_public_name_is_documented(module, name):
    assert re.search(rf"[\[ .]{name}\b", PAGE), f"{name} is missing in docs/api.md"
    assert (getattr(module, name).__doc__ or "").strip()
