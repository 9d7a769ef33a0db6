"""The pictures that explain the method: `docs/images/*.png`.

    python -m benchmarks.diagrams                    # all of them
    python -m benchmarks.diagrams structure levels

`structure` and `policies` are drawn; `levels` shows the tables of the library; `kept-in-a-block` what one block of a
ViT-B/16 keeps in a step on this machine. The background is white in dark mode, too.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.methods import apply
from benchmarks.models import IMAGE_SIZE, BenchmarkModel
from benchmarks.results import IMAGES
from peft_s2a.codecs.levels import DerivativeCodec
from peft_s2a.memory import saved_tensors
from peft_s2a.ops.derivatives import Gelu

FROZEN, TRAINED, KEPT, INK = "#d9dde3", "#f6b26b", "#9fc5e8", "#222222"


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty picture whose coordinates are inches."""
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str, **style: Any) -> None:
    """A labelled box with its lower left corner at (x, y)."""
    patch = FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.08", fc=color, ec=INK, lw=0.9)
    axes.add_patch(patch)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=INK, **{"fontsize": 9} | style)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = INK, **style: Any) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.2} | style)


def structure() -> Figure:
    """A block with its three trained parts, and what each gradient needs."""
    figure, axes = _canvas(10.2, 4.7)
    middle = 2.75
    axes.text(0.1, middle + 0.14, "input x\nof a block", fontsize=9, va="bottom")
    _arrow(axes, (0.1, middle), (1.75, middle))
    axes.text(1.9, middle, "⊕", fontsize=17, ha="center", va="center")
    _box(axes, 1.15, 3.65, 1.5, 0.62, "prompt A P", TRAINED)
    _arrow(axes, (1.9, 3.65), (1.9, middle + 0.16))
    _arrow(axes, (2.05, middle), (2.55, middle))

    axes.add_patch(
        FancyBboxPatch((2.55, 2.05), 5.45, 1.45, "round,pad=0,rounding_size=0.1", fc="white", ec=INK, lw=1.2)
    )
    axes.text(5.27, 3.62, "frozen block", fontsize=9, ha="center")
    for index, name in enumerate(("norm", "q, k, v", "attention", "linear", "norm", "linear", "GELU", "linear")):
        x = 2.66 + 0.66 * index
        has_bias = name not in ("attention", "GELU")
        _box(axes, x, 2.6, 0.6, 0.5, name, FROZEN, fontsize=7)
        if has_bias:
            _box(axes, x + 0.15, 2.18, 0.3, 0.27, "+δ", TRAINED, fontsize=8)
    _arrow(axes, (8.0, middle), (8.62, middle))
    axes.text(8.78, middle, "⊕", fontsize=17, ha="center", va="center")
    _arrow(axes, (8.94, middle), (10.05, middle))
    axes.text(9.25, middle + 0.14, "output", fontsize=9, va="bottom")

    low = 1.2
    axes.plot([2.3, 2.3, 2.7], [middle, low, low], color=INK, lw=1.2)
    _box(axes, 2.7, low - 0.26, 1.75, 0.52, "means over s channels", FROZEN, fontsize=8)
    _box(axes, 4.8, low - 0.26, 1.0, 0.52, "linear d → d", TRAINED, fontsize=8)
    _box(axes, 6.1, low - 0.26, 0.6, 0.52, "GELU", FROZEN, fontsize=8)
    _box(axes, 7.0, low - 0.26, 1.05, 0.52, "linear d → D", TRAINED, fontsize=8)
    for left, right in ((4.45, 4.8), (5.8, 6.1), (6.7, 7.0)):
        _arrow(axes, (left, low), (right, low))
    axes.plot([8.05, 8.78], [low, low], color=INK, lw=1.2)
    _arrow(axes, (8.78, low), (8.78, middle - 0.16))
    axes.text(2.7, low + 0.34, "side branch: keeps features of d = D/s channels only", fontsize=8, va="bottom")

    _box(axes, 0.15, 0.15, 0.3, 0.25, "", TRAINED)
    axes.text(0.55, 0.27, "trained", fontsize=9, va="center")
    _box(axes, 1.35, 0.15, 0.3, 0.25, "", FROZEN)
    axes.text(1.75, 0.27, "frozen, or without weights", fontsize=9, va="center")
    axes.text(
        10.05,
        0.27,
        "gradients:   dδ = Σ dy      dA = Σ dy Pᵀ      dP = Aᵀ Σ dy:   none needs x",
        fontsize=9,
        ha="right",
        va="center",
    )
    return figure


def policies() -> Figure:
    """What is kept between forward and backward of a block, and what backward runs again."""
    figure, axes = _canvas(10.2, 4.5)
    rows = (
        ("stock torch", ("", "x", "q k v, out", "", "x", "", "h's input"), "float32", 1.0, "nothing"),
        ("keep", ("", "x̂", "q k v", "", "x̂", "", "h′"), "4 bits", 0.5, "nothing; codes are read"),
        ("rebuild", ("", "x̂", "", "", "x̂", "", ""), "8 bits", 0.65, "q, k, v and the MLP's\nfirst product, from x̂"),
        ("recompute", ("x", "", "", "", "", "", ""), "4 bits", 0.5, "the whole block, from x,\na few images at a time"),
    )
    columns = ("input", "norm", "attention", "linear", "norm", "linear", "GELU")
    for index, name in enumerate(columns):
        axes.text(2.25 + 0.78 * index, 4.15, name, fontsize=8, ha="center", color="#555555")
    axes.text(7.6, 4.15, "backward runs again", fontsize=8, color="#555555")
    for row, (name, kept, bits, scale, again) in enumerate(rows):
        y = 3.3 - row * 1.0
        axes.text(0.15, y + 0.32, name, fontsize=11, va="center", weight="bold")
        axes.text(0.15, y + 0.06, bits, fontsize=8, va="center", color="#555555")
        axes.plot([1.75, 7.35], [y - 0.18, y - 0.18], color="#dddddd", lw=0.8)
        for index, content in enumerate(kept):
            x = 2.25 + 0.78 * index
            if content:
                height = 0.56 * scale
                _box(axes, x - 0.3, y + 0.2 - height / 2, 0.6, height, content, KEPT, fontsize=8)
            else:
                axes.text(x, y + 0.2, "–", ha="center", va="center", color="#999999")
        axes.text(7.6, y + 0.2, again, fontsize=8.5, va="center")
    return figure


def levels() -> Figure:
    """The derivative of GELU, and what is left of it in 2 and in 4 bits."""
    x = torch.linspace(-4, 4, 4096)
    figure = Figure(figsize=(10.2, 3.6), layout="constrained", facecolor="white")
    for axes, bits in zip(figure.subplots(1, 2, sharey=True), (2, 4), strict=True):
        codec = DerivativeCodec(Gelu(), bits)
        axes.plot(x, Gelu()(x), color=INK, lw=1.2, label="h′(x), exact")
        axes.plot(x, codec.decode(codec.encode(x), x.numel(), x.dtype), color="#cc4125", lw=1.5, label="decoded")
        axes.set(title=f"{bits} bits: {2**bits} levels", xlabel="x")
        axes.grid(alpha=0.25)
        axes.legend(loc="upper left")
    return figure


OTHER = "block input, side branch"


def _part(operator: str, module: str) -> str | None:
    """Which part of the block keeps it; None for what lies outside: embedding, last norm, head, loss."""
    if ".layers." in module:
        named = {"Norm": "norms", "Attention": "attention", "Gelu": "GELU", "Pointwise": "GELU"}
        return next((title for part, title in named.items() if part in operator), OTHER)
    # the side branch runs in a hook, where the module around the block is the innermost one
    return OTHER if module.endswith("vit") and operator.startswith(("LinearFunction", "PointwiseFunction")) else None


def kept_in_a_block() -> Figure:
    """MB per image that one block keeps, by operator: stock torch and the policies."""
    settings: dict[str, tuple[str, dict[str, Any]]] = {
        "bias only,\nstock torch": ("bias_only", {}),
        "keep, 4 bits": ("s2a", {}),
        "rebuild": ("s2a", {"activation_policy": "rebuild"}),
        "recompute": ("s2a", {"activation_policy": "recompute"}),
    }
    found: dict[str, dict[str, float]] = {}
    for name, (method, fields) in settings.items():
        base = ViTForImageClassification(ViTConfig(image_size=IMAGE_SIZE, num_hidden_layers=1, num_labels=10))
        base = BenchmarkModel(base, ["classifier"], from_transformers=True)
        sizes: dict[str, float] = defaultdict(float)
        for saved in saved_tensors(apply(method, base, fields), base.batch(1)):
            if part := _part(saved.operator, saved.module):
                sizes[part] += saved.bytes / 1e6
        found[name] = sizes
    figure = Figure(figsize=(10.2, 3.2), layout="constrained", facecolor="white")
    axes = figure.subplots()
    left = dict.fromkeys(found, 0.0)
    colors = {"norms": "#6fa8dc", "attention": "#f6b26b", "GELU": "#93c47d", OTHER: "#b4a7d6"}
    for source, color in colors.items():
        widths = [found[name].get(source, 0.0) for name in found]
        axes.barh(list(found), widths, left=list(left.values()), color=color, label=source, edgecolor="white")
        left = {name: left[name] + width for name, width in zip(found, widths, strict=True)}
    for name, total in left.items():
        axes.text(total + 0.06, name, f"{total:.2f}", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, max(left.values()) * 1.06)
    axes.set(xlabel="MB per image that one block of a ViT-B/16 keeps, float32, 224 pixels")
    axes.legend(loc="lower right")
    return figure


DIAGRAMS = {"structure": structure, "policies": policies, "levels": levels, "kept-in-a-block": kept_in_a_block}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(DIAGRAMS), help=", ".join(DIAGRAMS))
    for name in parser.parse_args().names:
        DIAGRAMS[name]().savefig(IMAGES / f"{name}.png", dpi=120)


if __name__ == "__main__":
    main()
