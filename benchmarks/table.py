"""How a benchmark shows what it found: a table on stderr, a JSON line on stdout."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def cpu_name() -> str:
    """Return the CPU's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def report(benchmark: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Print the rows ``{measure, value[, target, unit, note]}`` of one benchmark."""
    table = Table("measure", "value", "target", "note", title=f"{benchmark} on {cpu_name()}")
    for row in rows:
        value = row["value"]
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        table.add_row(
            row["measure"],
            f"{shown} {row.get('unit', '')}".strip(),
            row.get("target", ""),
            row.get("note", ""),
        )
    Console(stderr=True, width=110).print(table)
    found = {row["measure"]: row["value"] for row in rows}
    print(
        json.dumps({"benchmark": benchmark, "cpu": cpu_name(), **settings, "found": found}),
        flush=True,
    )
