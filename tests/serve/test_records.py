"""The writer of records from several threads, and over a deploy."""

from __future__ import annotations

import threading
from pathlib import Path

from trace_ray.config.serve import Records
from trace_ray.serve.records import RecordWriter, read_records


def test_rows_that_come_while_another_thread_finishes_files_are_all_kept(tmp_path: Path) -> None:
    """As the check of an ingress's health does, beside the loop that answers."""
    writer, done = RecordWriter(str(tmp_path), Records(rows=1)), threading.Event()
    failed: list[Exception] = []

    def check_health() -> None:
        try:
            while not done.is_set():
                writer.tidy(close=True)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=check_health) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        kept = [writer.keep({"n": n}) for n in range(2000)]
    finally:
        done.set()
        for thread in threads:
            thread.join()
    writer.tidy(close=True)
    assert (failed, all(kept), writer.problem) == ([], True, "")
    assert sorted(row["n"] for row in read_records(tmp_path)) == list(range(2000))
    assert not list(tmp_path.glob(".decisions-*"))


def test_a_writer_is_kept_for_the_settings_it_has(tmp_path: Path) -> None:
    settings = Records(rows=7).model_dump(mode="json")
    writer = RecordWriter.of(str(tmp_path), settings, lambda: None)
    assert writer is not None
    assert writer.is_for(str(tmp_path), settings)
    assert not writer.is_for(str(tmp_path), settings | {"rows": 8})
    assert not writer.is_for(str(tmp_path / "other"), settings)
    assert not writer.is_for(None, settings)
    assert RecordWriter.of(None, settings, lambda: None) is None
