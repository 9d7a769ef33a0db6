"""The table of the documentation: integrations down, architectures across."""

from __future__ import annotations

from benchmarks.markdown import markdown_table
from benchmarks.results import read


def integrations_table() -> str:
    """ "✓" works, a number: refused for that reason; the reasons follow."""
    found = {(record["integration"], record["architecture"]): record for record in read("integrations")}
    integrations = list(dict.fromkeys(integration for integration, _ in found))
    architectures = list(dict.fromkeys(architecture for _, architecture in found))
    reasons: dict[str, int] = {}
    rows = []
    for integration in integrations:
        cells = []
        for architecture in architectures:
            record = found[integration, architecture]
            works = record["outcome"] == "works"
            cells.append("✓" if works else f"({reasons.setdefault(record['reason'], len(reasons) + 1)})")
        rows.append([integration, *cells])
    table = markdown_table(["", *architectures], rows)
    return table + "\n" + "".join(f"({number}) {reason}.<br>\n" for reason, number in reasons.items())
