"""How a benchmark shows what it found: a table on stderr, a JSON line on stdout."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from trace_ray.models.device import has_gpu


def device_name() -> str:
    """Return the model name of the GPU, where there is one, else of the CPU."""
    if has_gpu():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def report(benchmark: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Print the rows ``{measure, value[, target, unit, note]}`` of one benchmark."""
    table = Table("measure", "value", "target", "note", title=f"{benchmark} on {device_name()}")
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
        json.dumps({"benchmark": benchmark, "device": device_name(), **settings, "found": found}),
        flush=True,
    )
