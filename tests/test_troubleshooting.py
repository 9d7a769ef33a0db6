"""Every message that the library raises or warns with is explained in the documentation."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import peft_s2a

PACKAGE = Path(peft_s2a.__file__).parent
PAGE = PACKAGE.parent / "docs" / "troubleshooting.md"


def constant_parts(node: ast.expr) -> list[str]:
    """The parts of a message that are always the same; of an f-string those between its fields."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return [value.value for value in node.values if isinstance(value, ast.Constant)]
    return []


def messages() -> Iterator[tuple[str, list[str]]]:
    """Place and constant parts of the message of every `raise` and `warnings.warn`."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            if isinstance(node, ast.Raise) or ast.unparse(call.func) == "warnings.warn":
                yield f"{path.relative_to(PACKAGE)}:{call.lineno}", constant_parts(call.args[0])


def test_every_message_is_explained():
    page = re.sub(r"\s+", " ", PAGE.read_text(encoding="utf-8"))
    found = list(messages())
    assert len(found) > 20
    unexplained = []
    for place, parts in found:
        telling = max((part.strip(" .:;,()'") for part in parts), key=len, default="")
        if (
            telling
            and telling.split(". ")[0][:40] not in page
            and not any(part.strip()[:40] in page for part in parts if len(part.strip()) >= 10)
        ):
            unexplained.append(f"{place}: {telling}")
    assert unexplained == []
