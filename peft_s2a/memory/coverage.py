"""What each module and operator keeps, and by which rule: the proof that nothing large is kept in full."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from .accounting import SavedTensor, saved_tensors
from .running import Batch

Rule = Literal["coded", "exact", "leftover", "in full"]

RULES: dict[Rule, str] = {
    "coded": "an operator of this library keeps codes",
    "exact": "kept in what the exact gradient needs",
    "leftover": "saved by an operator of torch, kept in codes",
    "in full": "saved by an operator of torch, kept as it is",
}


@dataclass(frozen=True)
class CoverageRow:
    """What one operator keeps in one module.

    Attributes:
        module: path of the module whose forward was running.
        operator: autograd node.
        rule: one of `RULES`.
        bits: bits per element of the codes; None where there are none.
        tensors: number of storages.
        bytes: their size.
    """

    module: str
    operator: str
    rule: Rule
    bits: int | None
    tensors: int
    bytes: int


@dataclass(frozen=True)
class CoverageReport:
    """Rows, largest first; `print(report)` shows them, `report.as_dicts()` gives data."""

    rows: tuple[CoverageRow, ...]

    @property
    def total_bytes(self) -> int:
        return sum(row.bytes for row in self.rows)

    def bytes_by_rule(self) -> dict[Rule, int]:
        """Bytes kept by each rule."""
        return {rule: sum(row.bytes for row in self.rows if row.rule == rule) for rule in RULES}

    def left_alone(self) -> tuple[CoverageRow, ...]:
        """What is kept in full."""
        return tuple(row for row in self.rows if row.rule == "in full")

    def as_dicts(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]

    def lines(self, most: int | None = None) -> Iterator[str]:
        """The table as text, `most` rows of it."""
        yield f"{'bytes':>12}  {'bits':>4}  {'rule':<8}  {'operator':<32}  module"
        for row in self.rows[:most]:
            bits = "-" if row.bits is None else str(row.bits)
            yield f"{row.bytes:>12,}  {bits:>4}  {row.rule:<8}  {row.operator:<32}  {row.module}"
        for rule, count in self.bytes_by_rule().items():
            yield f"{count:>12,}  {'':>4}  {rule:<8}  {RULES[rule]}"

    def __str__(self) -> str:
        return "\n".join(self.lines())


def _rule(saved: SavedTensor) -> Rule:
    if saved.leftover:
        return "exact" if saved.exact else "leftover"
    if saved.operator.endswith("FunctionBackward"):
        return "coded" if saved.bits is not None else "exact"
    return "in full"


def coverage_report(model: nn.Module, batch: Batch) -> CoverageReport:
    """Lists what a training forward of `model(batch)` keeps for backward, per module and operator.

    Args:
        model: a model, adapted or not; its mode and buffers are put back afterwards.
        batch: a tensor, a tuple of arguments or a mapping of keyword arguments.
    """
    groups: dict[tuple[str, str, Rule, int | None], list[int]] = {}
    for saved in saved_tensors(model, batch):
        groups.setdefault((saved.module, saved.operator, _rule(saved), saved.bits), []).append(saved.bytes)
    rows = [CoverageRow(*key, tensors=len(sizes), bytes=sum(sizes)) for key, sizes in groups.items()]
    return CoverageReport(tuple(sorted(rows, key=lambda row: -row.bytes)))
