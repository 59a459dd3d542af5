"""Reading preference pairs: rows per second, and the driver's memory as the rows grow.

Writes N synthetic rows to one jsonl file, reads them with ``data.ingest`` on a local Ray (started
before the clock), each N in a process of its own, and prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def write(path: Path, rows: int) -> None:
    """Write ``rows`` pairs of about 300 bytes; one in 1000 is malformed, one in 100 a repeat."""
    answer = "Open the menu, choose the calendar and switch it on for everyone in your team. "
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            number = i - 50 if i % 100 == 99 else i
            row = {"prompt": f"How do I set up calendar number {number}?"}
            row["chosen"] = answer + str(number % 7)
            if i % 1000 != 500:
                row["rejected"] = "I am sorry, but I cannot help you with this request at all. " * 2
            file.write(json.dumps(row) + "\n")


def measure(rows: int) -> dict[str, Any]:
    """Ingest ``rows`` in this process and return what it took."""
    from trace_ray.data.ingest import ingest
    from trace_ray.runtime.cluster import connected

    with tempfile.TemporaryDirectory() as name, connected():
        folder = Path(name)
        write(folder / "pairs.jsonl", rows)
        started = time.monotonic()
        report = ingest(folder / "pairs.jsonl", "pairs", folder / "out", folder / "bad.jsonl")
        seconds = time.monotonic() - started
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "rows": rows,
        "pairs": report.rows,
        "bad": report.bad,
        "duplicates": report.duplicates,
        "seconds": round(seconds, 2),
        "rows_per_s": round(rows / seconds),
        "driver_peak_mib": round(peak_kib / 1024, 1),
    }


def main() -> None:
    """Measure every N and print the results with the ratio of the largest and smallest peak."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--one", action="store_true", help="measure in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.rows[0])))
        return
    results = []
    for rows in args.rows:
        command = [sys.executable, __file__, "--one", "--rows", str(rows)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    peaks = [result["driver_peak_mib"] for result in results]
    ratio = round(peaks[-1] / peaks[0], 3)
    print(json.dumps({"results": results, "peak_ratio_last_to_first": ratio}, indent=2))


if __name__ == "__main__":
    main()
