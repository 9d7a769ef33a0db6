"""Imports go down only: what each part of the package may import of the others."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

import peft_s2a

PACKAGE = Path(peft_s2a.__file__).parent
ALLOWED: dict[str, set[str]] = {
    "settings": set(),
    "pieces": set(),
    "structure": set(),
    "precision": {"memory", "settings"},
    "memory": {"pieces"},
    "codecs": {"pieces"},
    "ops": {"codecs", "pieces", "settings"},
    "table": {"codecs", "ops", "settings", "structure"},
    "mode": {"ops", "settings", "table"},
    "interception": {"mode", "ops", "settings", "table"},
    "blockwise": {"interception", "ops", "pieces", "structure"},
    "tuner": {"blockwise", "interception", "memory", "precision", "settings", "structure"},
    "integrations": {"memory", "precision", "settings", "structure", "tuner"},
    "__main__": {"integrations"},
    "__init__": {"codecs", "integrations", "memory", "precision", "settings", "structure", "tuner"},
}
"""For each part (a module or folder directly in the package) the parts that it may import."""


def parts() -> dict[str, list[Path]]:
    """The Python files of each part."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        found.setdefault(relative.parts[0].removesuffix(".py"), []).append(path)
    return found


def imported_modules(path: Path, source: str | None = None) -> set[str]:
    """Full names of the modules that a file imports anywhere in it, also inside functions and under conditions.

    `from . import x` gives both the package and `x` in it.
    """
    relative = path.relative_to(PACKAGE.parent).with_suffix("").parts
    package = ".".join(relative[:-1])
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8") if source is None else source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def imported_parts(path: Path, source: str | None = None) -> set[str]:
    """The parts of the package that a file imports, its own left out."""
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    names = (name.split(".") for name in imported_modules(path, source))
    found = {name[1] for name in names if name[0] == PACKAGE.name and len(name) > 1}
    return {part for part in found if part in parts()} - {own}


def test_every_part_is_listed():
    assert set(parts()) == set(ALLOWED)


@pytest.mark.parametrize("part", list(ALLOWED))
def test_imports_go_down(part):
    upward = {
        str(path.relative_to(PACKAGE)): sorted(imported_parts(path) - ALLOWED[part])
        for path in parts()[part]
        if imported_parts(path) - ALLOWED[part]
    }
    assert upward == {}


def test_every_file_is_on_the_page():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = [path for path in PACKAGE.rglob("*.py") if not path.stem.startswith("__")]
    assert [str(path) for path in files if f"`{path.stem}`" not in page and f"`{path.name}`" not in page] == []


def test_there_is_no_circle():
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {part for part, below in ALLOWED.items() if part not in done and below <= done}
        assert ready, f"a circle among {set(ALLOWED) - done}"
        done |= ready


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from ..tuner.config import S2AConfig", {"tuner"}),
        ("from .. import tuner", {"tuner"}),
        ("import peft_s2a.ops.pointwise", {"ops"}),
        ("def f():\n    from peft_s2a.tuner import S2AModel", {"tuner"}),
        ("from .base import Codec\nimport torch", set()),
    ],
)
def test_an_upward_import_would_be_seen(source, expected):
    assert imported_parts(PACKAGE / "codecs" / "mask.py", source) == expected
