"""The plot of an allocation: layers across, operators down, bits as colours."""

from __future__ import annotations

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
    rows: dict[str, None] = {}
    columns: dict[str, None] = {}
    cells: dict[tuple[str, str], int] = {}
    for group in allocation.groups:
        module, _, operator = group.name.partition(":")
        row, column = (operator, module) if operator else (group.kind, "all" if allocation.by == "kind" else "others")
        number = _layer(column)
        rows[row] = columns[number] = None
        cells[_operator(column, row), number] = group.bits
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


def _layer(path: str) -> str:
    """The numbers in a module's path: `"stages.1.layers.0.mlp"` is in 1.0; others go by their name."""
    return ".".join(part for part in path.split(".") if part.isdigit()) or path or "model"


def _operator(path: str, operator: str) -> str:
    """The operator behind the part of the path that comes after its last number."""
    places = _numbers(path)
    rest = ".".join(path.split(".")[places[-1] + 1 :]) if places else ""
    return f"{rest} {operator}".strip()


def _square(x: int, y: int, color: object) -> Patch:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=color, edgecolor="white")
