"""Triage by rules at scale: pairs per second through Ray Data, and the driver's memory while it runs.

Runs the whole path (read parquet, judge, store verdicts, write parquet, sort it) on synthetic pairs,
first few, then many, and prints one JSON line. Ray's start and the making of the pairs are not timed;
the start of the actors is. Then the driver goes through all rows in order, as it does for a report.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import typer


def make_pairs(folder: Path, n: int, per_file: int = 100_000) -> None:
    """Write ``n`` distinct pairs: the synthetic benchmark's over and over, their texts numbered."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from trace_ray.data.sources import pair_schema
    from trace_ray.data.synthetic import generate

    rows = [gold.pair.to_row() for gold in generate().pairs]
    folder.mkdir(parents=True)
    for first in range(0, n, per_file):
        numbers = range(first, min(first + per_file, n))
        made = [
            rows[i % len(rows)]
            | {
                "pair_id": f"{i:016x}",
                "prompt": [
                    {"role": turn["role"], "content": f"{turn['content']} ({i})"}
                    for turn in rows[i % len(rows)]["prompt"]
                ],
                "chosen": f"{rows[i % len(rows)]['chosen']} ({i})",
                "rejected": f"{rows[i % len(rows)]['rejected']} ({i})",
            }
            for i in numbers
        ]
        pq.write_table(
            pa.Table.from_pylist(made, schema=pair_schema()), folder / f"{first}.parquet"
        )


class Memory:
    """The most resident memory of this process within the block, MB."""

    def __enter__(self) -> Memory:
        self.most_mb, self.stop = 0.0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.stop.wait(0.2):
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
            self.most_mb = max(self.most_mb, resident)


def timed(folder: Path, n: int, policy: str, store: bool) -> dict[str, Any]:
    """Triage ``n`` pairs and return what it took."""
    from trace_ray.rollout.plan import load_policy
    from trace_ray.runtime.judges import rule_judge
    from trace_ray.runtime.triage import triage_pairs
    from trace_ray.runtime.triaged import TriagedRows
    from trace_ray.runtime.verdict_store import VerdictStore

    verdicts = VerdictStore(str(folder / f"verdicts-{n}")) if store else None
    started = time.perf_counter()
    with Memory() as memory:
        triage_pairs(
            folder / f"pairs-{n}", folder / f"out-{n}", rule_judge(load_policy(policy)), verdicts
        )
        wall_s = time.perf_counter() - started
        written = sum(table.num_rows for table in TriagedRows(folder / f"out-{n}").tables())
        read_s = time.perf_counter() - started - wall_s
    if written != n:
        raise RuntimeError(f"{written} rows written, not {n}")
    return {
        "pairs": n,
        "wall_s": round(wall_s, 1),
        "pairs_per_s": round(n / wall_s),
        "read_s": round(read_s, 1),
        "driver_mb": round(memory.most_mb),
    }


def main(
    few: int = 100_000,
    many: int = 1_000_000,
    policy: str = "examples/policy-2026.2.yaml",
    store: bool = True,
) -> None:
    """Measure ``few`` pairs, then ``many``."""
    from trace_ray.runtime.cluster import connected

    with tempfile.TemporaryDirectory() as name, connected():
        folder = Path(name)
        for n in (few, many):
            make_pairs(folder / f"pairs-{n}", n)
        runs = [timed(folder, n, policy, store) for n in (few, many)]
    growth = runs[1]["driver_mb"] / runs[0]["driver_mb"]
    print(json.dumps({"runs": runs, "driver_memory_ratio": round(growth, 3)}))


if __name__ == "__main__":
    typer.run(main)
