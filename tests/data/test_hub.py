"""``hf://`` sources through the datasets library, from folders that it takes in place of the Hub."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from trace_ray.data.files import locate, split
from trace_ray.data.ingest import ingest
from trace_ray.data.sources import part_rows, read_pairs
from trace_ray.errors import DataError
from trace_ray.types import PreferencePair

ROWS = [
    {
        "chosen": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "Yes."}],
        "rejected": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "No."}],
    }
    for i in range(30)
]


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A dataset of three train files and a test file, where ``acme/prefs`` resolves to it."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "acme" / "prefs"
    folder.mkdir(parents=True)
    for number in range(3):
        rows = ROWS[10 * number : 10 * number + 10]
        if number == 2:
            rows = [*rows, ROWS[0], {"chosen": [], "rejected": []}]
        (folder / f"train-{number}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "test-0.jsonl").write_text(json.dumps(ROWS[3]) + "\n")
    return folder


def test_ingest_streams_a_dataset(dataset, tmp_path):
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        out, bad = tmp_path / "out", tmp_path / "bad.jsonl"
        report = ingest("hf://acme/prefs", "messages", out, bad, max_bad_fraction=0.1)
        assert (report.rows, report.bad, report.duplicates) == (30, 1, 1)
        pairs = [PreferencePair.from_row(row) for row in pq.read_table(out).to_pylist()]
        assert [pair.prompt[0].content for pair in pairs] == [f"{i}?" for i in range(30)]
        assert pairs[15].source == "hf://acme/prefs:16"  # rows count through the whole split
        (row,) = map(json.loads, bad.open())
        assert (row["file"], row["line"]) == ("hf://acme/prefs", 32)
        test = ingest("hf://acme/prefs:test", "messages", tmp_path / "test", bad)
        assert test.rows == 1
    finally:
        ray.shutdown()


def test_parquet_is_cut_by_row_groups(dataset, tmp_path):
    folder = tmp_path / "acme" / "table"
    folder.mkdir()
    for number in range(2):
        table = pa.Table.from_pylist(ROWS[15 * number : 15 * number + 15])
        pq.write_table(table, folder / f"train-{number}.parquet", row_group_size=4)
    source, parts = split(locate("hf://acme/table"))
    assert len(parts) == 8
    rows = [row for part in parts for _, row in part_rows(source, part)]
    assert rows == ROWS


def test_its_version_follows_its_files(dataset):
    def version():
        return locate("hf://acme/prefs").files[0].version

    first = version()
    assert version() == first
    assert locate("hf://acme/prefs:test").files[0].version != first
    os.utime(dataset / "train-1.jsonl", ns=(1, 1))
    assert version() != first


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("hf://acme", "must be hf://owner/name"),
        ("hf://acme/prefs:nope", "Bad split: nope. Available splits"),
        ("hf://acme/prefs/english", "'english' not found. Available: .*check the name, config"),
        ("hf://acme/none@v1:test", "the Hub can't be reached .offline"),
    ],
)
def test_what_is_not_there_is_named(dataset, source, text):
    with pytest.raises(DataError, match=text) as caught:
        locate(source)
    assert str(caught.value).startswith(f"{source}: ")


def test_a_file_that_breaks_off_names_its_place(dataset, tmp_path):
    (dataset / "test-0.jsonl").write_text("{")
    source = locate("hf://acme/prefs:test")
    with pytest.raises(
        DataError, match="hf://acme/prefs:test: can't be read after row 0 of shard 0"
    ):
        list(read_pairs(source, "messages"))
