"""The command line: `peft-s2a plan` says what fits, `peft-s2a report` what is in an adapter."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ..memory import CannotSimulateError
from ..memory.budget import format_bytes
from ..memory.plan import HEADER
from ..precision import Allocation
from ..tuner import plan
from ..tuner.planning import OPTIMIZERS
from .adapter_report import adapter_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, or 2 after an error that is the user's to mend."""
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options.command(options)
    except (ValueError, OSError, CannotSimulateError, ImportError) as error:
        print(f"peft-s2a: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peft-s2a", description="Memory-efficient fine-tuning: plans and reports.")
    commands = parser.add_subparsers(required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON instead of a table")
    common.add_argument("--plot", metavar="FILE", help="also draw it, for example to plan.png")

    planning = commands.add_parser("plan", parents=[common], help="predict what fine-tuning a model needs")
    planning.add_argument(
        "--model", required=True, help="name of transformers, folder with a config.json, or timm/NAME"
    )
    planning.add_argument("--batch-size", type=int, default=32)
    planning.add_argument("--budget", default="8GB", help="memory of the device, such as 8GB or 7.5GiB")
    planning.add_argument("--image-size", type=int, help="default: the model's own")
    planning.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    planning.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adamw")
    planning.set_defaults(command=_plan)

    report = commands.add_parser("report", parents=[common], help="show what is in a saved adapter")
    report.add_argument("adapter", help="folder with adapter_config.json")
    report.set_defaults(command=_report)
    return parser


def _plan(options: argparse.Namespace) -> None:
    found = plan(
        options.model,
        batch_size=options.batch_size,
        image_size=options.image_size,
        dtype=options.dtype,
        optimizer=options.optimizer,
        budget=options.budget,
    )
    lines = _table(found.title(), HEADER, found.cells())
    _show(options, found, [lines, *found.summary()])


def _report(options: argparse.Namespace) -> None:
    found = adapter_report(options.adapter)
    settings = [[name, str(value)] for name, value in found.settings.items()]
    parts = [[part.name, str(part.tensors), f"{part.parameters:,}", format_bytes(part.bytes)] for part in found.parts]
    total = sum(part.parameters for part in found.parts)
    parts.append(
        [
            "total",
            str(sum(p.tensors for p in found.parts)),
            f"{total:,}",
            format_bytes(sum(p.bytes for p in found.parts)),
        ]
    )
    _show(
        options,
        found,
        [
            _table(found.folder, ("setting", "value"), settings, numbers=False),
            _table("", ("part", "tensors", "parameters", "size"), parts),
            *([] if found.allocation is None else [_bits_table(Allocation.from_dict(found.allocation))]),
        ],
    )


def _bits_table(allocation: Allocation) -> Table:
    rows = [[g.name, f"{g.elements:,}", str(g.bits), f"{g.error:.4f}"] for g in allocation.groups]
    rows.append(["all", "", f"{allocation.average_bits:.2f}", f"{allocation.error:.4f}"])
    return _table("", ("operators", "elements", "bits", "error"), rows)


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> Table:
    table = Table(title=title or None, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if numbers and index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _show(options: argparse.Namespace, found: Any, parts: Sequence[Any]) -> None:
    if options.plot:
        found.plot(options.plot)
    if options.json:
        print(json.dumps(found.as_dict(), indent=2))
        return
    # a file or a pipe has no width to fit into
    console = Console() if sys.stdout.isatty() else Console(width=160)
    for part in parts:
        console.print(part, highlight=False)
