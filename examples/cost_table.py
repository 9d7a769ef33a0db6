"""What one training step costs under S2A, LoRA, LoRA + gradient checkpointing and full fine-tuning, at one batch."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from methods import TITLES, MethodOptions, apply_method
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from peft_s2a.memory import peak_step_bytes, saved_activation_bytes

COMPARED = ("s2a", "lora", "lora_checkpointing", "full")
Row = dict[str, Any]


def measure_cost(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Row:
    """Cost of one AdamW step, in bytes.

    `kept_bytes`: what autograd keeps from forward to backward. `peak_bytes`: the most that is live at once during the
    step above the loaded model and the optimizer's state: activations, temporaries and gradients.
    `optimizer_bytes`: AdamW's two moments of every trained parameter.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    kept = saved_activation_bytes(model, batch)
    peak = peak_step_bytes(model, batch, optimizer)
    return {
        "trainable_parameters": sum(parameter.numel() for parameter in trained),
        "kept_bytes": kept,
        "peak_bytes": peak,
        "optimizer_bytes": sum(2 * parameter.nbytes for parameter in trained),
    }


def measure_costs(
    load_model: Callable[[], PreTrainedModel],
    batch: dict[str, torch.Tensor],
    options: MethodOptions | None = None,
    methods: Sequence[str] = COMPARED,
) -> list[Row]:
    """One row per method, each on a fresh model; a method the model class cannot do gets the row `{"error": ...}`."""
    images, _, image_size, _ = batch["pixel_values"].shape
    shape = {"images": images, "image_size": image_size}
    rows = []
    for method in methods:
        row: Row = {"method": method, "title": TITLES[method], **shape}
        try:
            row |= measure_cost(apply_method(load_model(), method, options), batch)
        except ValueError as error:
            if method != "lora_checkpointing":
                raise
            row["error"] = f"not supported by this model: {error}"
        rows.append(row)
        gc.collect()
    return rows


def print_costs(rows: Sequence[Row]) -> None:
    """Print the rows as a table, in MB (1e6 bytes)."""
    table = Table(title=f"Cost of one training step, {rows[0]['images']} images of {rows[0]['image_size']} px, in MB")
    table.add_column("method", no_wrap=True)
    for heading in ("trained\nparameters", "kept for\nbackward", "peak above\nthe model", "optimizer\nstate"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if "error" in row:
            table.add_row(row["title"], row["error"])
        else:
            sizes = (f"{row[key] / 1e6:.1f}" for key in ("kept_bytes", "peak_bytes", "optimizer_bytes"))
            table.add_row(row["title"], f"{row['trainable_parameters']:,}", *sizes)
    Console().print(table)


def plot_costs(rows: Sequence[Row], path: Path) -> None:
    """Draw kept and peak bytes of every method as horizontal bars into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [row for row in reversed(rows) if "error" not in row]
    figure = Figure(figsize=(8, 1 + 0.7 * len(measured)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for offset, key, label in ((0.2, "kept_bytes", "kept for backward"), (-0.2, "peak_bytes", "peak above the model")):
        values = [row[key] / 1e6 for row in measured]
        bars = axes.barh([index + offset for index in range(len(measured))], values, height=0.38, label=label)
        axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_yticks(range(len(measured)), [row["title"] for row in measured])
    axes.set_xlabel(f"MB, one training step of {rows[0]['images']} images of {rows[0]['image_size']} px")
    axes.margins(x=0.12)
    axes.legend()
    figure.savefig(path, dpi=120)


def write_costs(rows: Sequence[Row], folder: Path) -> tuple[Path, Path]:
    """Write `cost.json` and `cost.png` into `folder` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    table, plot = folder / "cost.json", folder / "cost.png"
    table.write_text(json.dumps({"torch": torch.__version__, "rows": list(rows)}, indent=2) + "\n")
    plot_costs(rows, plot)
    return table, plot
