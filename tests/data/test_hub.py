"""``hf://`` sources through the datasets library, from folders that it takes in place of the Hub."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trace_ray.data.files import locate, split
from trace_ray.data.sources import part_rows, read_pairs
from trace_ray.errors import DataError


def test_parquet_is_cut_by_row_groups(dataset, tmp_path):
    folder = tmp_path / "acme" / "table"
    folder.mkdir()
    given = [json.loads(row) for path in sorted(dataset.glob("train-*")) for row in path.open()]
    for number in range(2):
        table = pa.Table.from_pylist(given[15 * number : 15 * number + 15])
        pq.write_table(table, folder / f"train-{number}.parquet", row_group_size=4)
    source, parts = split(locate("hf://acme/table"))
    assert len(parts) == 8
    rows = [row for part in parts for _, row in part_rows(source, part)]
    assert rows == given[:30]


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
