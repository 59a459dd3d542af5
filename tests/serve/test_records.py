"""The writer of records: from several threads, over a deploy, and what it keeps of long texts."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from trace_ray.config.serve import Records
from trace_ray.host import host_mark
from trace_ray.serve.harvest import harvest
from trace_ray.serve.records import RecordWriter, Redactor, read_records


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


def test_drafts_that_nobody_goes_on_with_are_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, name, lives = host_mark(), os.uname().nodename, os.getpid()
    # The last one is in another container of this hostname, where that number may well live.
    writers = (
        f"another-host-{lives}",
        f"another-{here}-99999999",
        f"{here}-99999999",
        f"{name}.0123abcd-99999999",
    )
    for n, writer in enumerate(writers):
        draft = tmp_path / f".decisions-20260101T000000.000000000-{writer}-abcdef.jsonl"
        draft.write_text(f'{{"n": {n}}}\n')
    writer = RecordWriter(str(tmp_path), Records())
    assert [row["n"] for row in read_records(tmp_path)] == [2]  # dead, on this host
    left = list(tmp_path.glob(".decisions-*"))
    writer.write({"n": 4})
    for draft in left:
        os.utime(draft, (time.time() - 4000, time.time() - 4000))
    monkeypatch.setattr(time, "monotonic", lambda: writer._opened + 200)
    writer.tidy(close=False)
    assert [row["n"] for row in read_records(tmp_path)] == [2]  # not at every look
    monkeypatch.setattr(time, "monotonic", lambda: writer._opened + 1000)
    writer.tidy(close=False)
    assert {row["n"] for row in read_records(tmp_path)} == {0, 1, 2, 3, 4}
    assert not list(tmp_path.glob(".decisions-*"))


def test_a_row_that_comes_after_the_end_is_not_left_in_a_draft(tmp_path: Path) -> None:
    writer = RecordWriter(str(tmp_path), Records())
    writer.write({"n": 1})
    writer.end()
    writer.write({"n": 2})
    assert [row["n"] for row in read_records(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    "run", ["a", "a@", "@", "a.", "a@b.", "1(", "1-", "1 ", "1", "1_", "(" * 9 + "1x"], ids=repr
)
def test_no_text_takes_long_to_redact(run: str) -> None:
    redact, text = Redactor(Records().redact), run * (200_000 // len(run))
    for each in (text, f"a@{text}", f"1{text}", f"{text}x"):
        started = time.monotonic()
        redact(each)
        assert time.monotonic() - started < 2  # quadratic ones take minutes


def test_of_a_long_text_the_beginning_is_kept_and_the_row_says_so(tmp_path: Path) -> None:
    writer = RecordWriter(str(tmp_path), Records(texts=True, rows=1, text_chars=1000))
    row = {"type": "decision", "request_id": "r", "index": 0, "model": "m", "label": "violates"}
    prompt = [{"role": "user", "content": "x" * 1000}]
    texts = {"prompt": prompt, "response": "bad", "retried": "good"}
    long = "y " * 495 + "me@example.org"  # the cut comes before its dot
    writer.write(row, texts)
    writer.write(row | {"request_id": "s"}, texts | {"response": long})
    longer = [*prompt, {"role": "user", "content": "x" * 1001}]
    writer.write(row | {"request_id": "t"}, texts | {"prompt": longer})
    whole, reply, asked = read_records(tmp_path)
    assert (whole["prompt"], "cut" in whole) == (prompt, False)
    assert (reply["response"], reply["cut"]) == (long[:800], ["response"])
    assert (asked["prompt"][1]["content"], asked["cut"]) == ("x" * 800, ["prompt"])
    counts = harvest(tmp_path, tmp_path / "pairs.jsonl")
    assert (counts["retried"], counts["without_texts"]) == (1, 2)
    assert json.loads((tmp_path / "pairs.jsonl").read_text())["source"] == "m:r:0"
