"""Realign a fleet: ``ray job submit -- python jobs/realign_fleet.py --config CONFIG``, or plain Python.

The same code as ``trace-ray apply CONFIG``.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trace_ray.cli import exits_cleanly, run_apply


def main(config: Annotated[Path, typer.Option(help="Fleet config (YAML).")]) -> None:
    """Run a fleet config."""
    with exits_cleanly():
        sys.exit(run_apply(str(config)))


if __name__ == "__main__":
    typer.run(main)
