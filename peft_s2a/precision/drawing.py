"""The plot of an allocation: layers across, operators down, bits as colours."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch

if TYPE_CHECKING:
    from .allocation import Allocation

LEVELS = (0, 1, 2, 3, 4, 6, 8)


def draw(allocation: Allocation, path: str | Path) -> None:
    """Writes the picture to `path`."""
    columns: dict[str, None] = {}
    cells: dict[tuple[str, str], int] = {}
    paths = [group.name.partition(":")[0] for group in allocation.groups if ":" in group.name]
    stacks = _stacks(paths)
    for group in allocation.groups:
        module, _, operator = group.name.partition(":")
        row, column = (operator, module) if operator else (group.kind, "all" if allocation.by == "kind" else "others")
        place = _layer(column, stacks.get(_container(column), ""))
        columns[place] = None
        cells[_operator(column, row), place] = group.bits
    names = list(dict.fromkeys(row for row, _ in cells))
    figure = Figure(figsize=(0.35 * len(columns) + 3.5, 0.3 * len(names) + 1.6), layout="constrained")
    axes = figure.subplots()
    colors = dict(zip(LEVELS, colormaps["viridis"].resampled(len(LEVELS)).colors, strict=True))  # type: ignore[attr-defined]
    places = list(columns)
    for (row, column), bits in cells.items():
        x, y = places.index(column), names.index(row)
        axes.add_patch(_square(x, y, colors[bits]))
        axes.text(x, y, str(bits or "r"), ha="center", va="center", fontsize=7, color="white" if bits < 4 else "black")
    axes.set(xlim=(-0.5, len(places) - 0.5), ylim=(len(names) - 0.5, -0.5), xlabel="layer")
    axes.set_xticks(range(len(places)), places, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_title(f"{allocation.average_bits:.2f} bits on average, expected error {allocation.error:.3f}", fontsize=9)
    handles = [Patch(color=colors[bits], label=str(bits or "rebuilt")) for bits in LEVELS]
    figure.legend(handles=handles, title="bits", loc="outside right center", fontsize=7)
    figure.savefig(path, dpi=110)


def _numbers(path: str) -> list[int]:
    return [index for index, part in enumerate(path.split(".")) if part.isdigit()]


def _container(path: str) -> tuple[str, ...]:
    """The parts of a path before its first number."""
    parts, places = path.split("."), _numbers(path)
    return tuple(parts[: places[0]]) if places else ()


def _stacks(paths: Iterable[str]) -> dict[tuple[str, ...], str]:
    """What tells the stacks of layers apart: `"encoder"` and `"decoder"`; nothing where there is but one."""
    found = list(dict.fromkeys(container for container in map(_container, paths) if container))
    if len(found) < 2:
        return {}
    before = _alike(found)
    after = _alike([container[before:][::-1] for container in found])
    return {container: ".".join(container[before : len(container) - after]) for container in found}


def _alike(paths: Sequence[tuple[str, ...]]) -> int:
    """How many parts at the front all paths share."""
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return len(list(shared))


def _layer(path: str, stack: str) -> str:
    """Stack and numbers in a module's path: `"stages.1.layers.0.mlp"` is in 1.0; others go by their name."""
    numbers = ".".join(part for part in path.split(".") if part.isdigit())
    return ".".join(filter(None, (stack, numbers))) or path or "model"


def _operator(path: str, operator: str) -> str:
    """The operator behind the part of the path that comes after its last number."""
    places = _numbers(path)
    rest = ".".join(path.split(".")[places[-1] + 1 :]) if places else ""
    return f"{rest} {operator}".strip()


def _square(x: int, y: int, color: object) -> Patch:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor="white")
