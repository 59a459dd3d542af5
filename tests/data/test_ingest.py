"""From a source to shards of distinct pairs: nothing lost, nothing twice, nothing half-written."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_ray.data import files, s3, shards
from trace_ray.data import ingest as ingestion
from trace_ray.data.files import DataFile, Part, Source, locate, split
from trace_ray.data.ingest import IngestReport, ingest
from trace_ray.data.sources import BadRow, part_rows, read_pairs
from trace_ray.errors import DataError
from trace_ray.types import PreferencePair

ROOT = Path(__file__).parents[2]
GOOD = {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}


def write_jsonl(path, rows):
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(b"\n".join(lines) + b"\n")
    return path


def written(out):
    return pq.read_table(out).to_pylist()


@pytest.fixture(scope="module")
def cluster():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


# Cutting files ----------------------------------------------------------------------------------

LINE = st.one_of(
    st.binary(max_size=12).map(lambda raw: raw.replace(b"\n", b"")),
    st.text("aé€𝄞\r \u2028\x85", max_size=8).map(str.encode),
)


@settings(max_examples=300, deadline=None)
@given(
    lines=st.lists(st.tuples(LINE, st.sampled_from([b"\n", b"\r\n"])), max_size=12),
    tail=LINE,
    bom=st.booleans(),
    size=st.integers(1, 20),
)
def test_parts_hold_each_line_once_under_its_number(tmp_path_factory, lines, tail, bom, size):
    data = b"\xef\xbb\xbf" * bom + b"".join(line + end for line, end in lines) + tail
    path = tmp_path_factory.mktemp("cut") / "data.jsonl"
    path.write_bytes(data)
    file = DataFile(str(path), len(data))
    source = Source(str(path), (file,))
    whole = list(part_rows(source, Part(file)))
    texts = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    found, offset = [], 0
    for start in range(0, len(data), size):
        line = 0
        for line, raw in part_rows(source, Part(file, start, start + size)):
            found.append((line + offset, raw))
        offset += line
    assert found == whole
    assert [raw for _, raw in whole if raw is not None] == [
        text.rstrip(b"\r\n") for text in texts if text.strip()
    ]


def test_large_files_are_cut_and_small_ones_bundled(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PART_BYTES", 1000)
    monkeypatch.setattr(ingestion, "PART_BYTES", 1000)
    rows = [GOOD | {"prompt": f"{i}?" * 9} for i in range(100)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=10)
    write_jsonl(tmp_path / "b.jsonl", rows)
    write_jsonl(tmp_path / "c.jsonl.gz", rows)
    for name in "defg":
        write_jsonl(tmp_path / f"{name}.jsonl", rows[:2])
    source = locate(tmp_path)
    _, parts = split(source)
    of = {name: [p for p in parts if Path(p.file.name).name.startswith(name)] for name in "abcd"}
    assert len(of["a"]) > 1
    assert of["a"][0].start == 0
    assert [p.end for p in of["a"][:-1]] == [p.start for p in of["a"][1:]]
    assert len(of["b"]) == -(-source.files[1].size // 1000)
    assert len(of["c"]) == len(of["d"]) == 1
    found = list(ingestion._shards(parts))
    assert [part for shard in found for part in shard.parts] == parts
    assert not any(part.start for shard in found for part in shard.parts[1:])
    assert len(found) < len(parts)


# The three passes -------------------------------------------------------------------------------


def expected(source, limit):
    """What one loop over all rows says must come out."""
    pairs, bad, duplicates = {}, [], 0
    for item in read_pairs(source, "pairs"):
        if isinstance(item, BadRow):
            bad.append(item)
        elif item.pair_id in pairs:
            duplicates += 1
        else:
            pairs[item.pair_id] = item
        if limit is not None and len(pairs) == limit:
            break
    return list(pairs.values()), bad, duplicates


KIND = st.one_of(st.integers(0, 12), st.sampled_from([b"{", b"", b'{"prompt": 1}']))
FILES = st.lists(
    st.tuples(st.sampled_from(["jsonl", "jsonl.gz"]), st.lists(KIND, max_size=30)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(contents=FILES, limit=st.one_of(st.none(), st.integers(1, 14)), size=st.integers(40, 600))
def test_the_passes_agree_with_one_loop(tmp_path_factory, contents, limit, size):
    folder = tmp_path_factory.mktemp("passes")
    (folder / "in").mkdir()
    for number, (suffix, kinds) in enumerate(contents):
        rows = [k if isinstance(k, bytes) else GOOD | {"prompt": f"é{k}?"} for k in kinds]
        write_jsonl(folder / "in" / f"{number}.{suffix}", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PART_BYTES", size)
        patch.setattr(ingestion, "PART_BYTES", size)
        patch.setattr(shards, "_BATCH", 3)
        patch.setattr(ingestion, "_BUCKET_ROWS", 5)
        patch.setattr(ingestion, "_FIRST_ROUND", 2)
        patch.setattr(ingestion, "_check_columns", lambda *_: None)
        patch.setattr(
            ingestion,
            "_on_cluster",
            lambda function, items, work: (function(i, work) for i in items),
        )
        source, out = locate(folder / "in"), folder / "pairs"
        pairs, bad, duplicates = expected(source, limit)
        if not pairs:
            with pytest.raises(DataError, match="no usable pair"):
                ingest(source, "pairs", out, folder / "bad.jsonl", 1, limit)
            return
        report = ingest(source, "pairs", out, folder / "bad.jsonl", 1, limit)
    assert [PreferencePair.from_row(row) for row in written(out)] == pairs
    assert [row["pair_id"] for row in written(out)] == [pair.pair_id for pair in pairs]
    assert (report.rows, report.bad, report.duplicates) == (len(pairs), len(bad), duplicates)
    if bad:
        kept = [BadRow(**json.loads(line)) for line in (folder / "bad.jsonl").open()]
        assert kept == bad
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


def test_ingest_on_ray(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PART_BYTES", 8000)
    monkeypatch.setattr(ingestion, "PART_BYTES", 8000)
    rows = [GOOD | {"prompt": f"{i}?"} for i in range(600)]
    write_jsonl(tmp_path / "a.jsonl", [*rows[:400], b"{", *rows[400:]])
    write_jsonl(tmp_path / "b.jsonl.gz", [rows[0], b"{", GOOD | {"prompt": "last"}])
    pq.write_table(pa.Table.from_pylist([*rows[300:], GOOD]), tmp_path / "c.parquet")
    out, quarantine = tmp_path / "out" / "pairs.parquet", tmp_path / "out" / "bad.jsonl"
    report = ingest(tmp_path / "[abc].*", "pairs", out, quarantine)
    assert report == IngestReport(602, 2, 301, str(quarantine))
    bad = [json.loads(line) for line in quarantine.open()]
    places = [(str(tmp_path / "a.jsonl"), 401), (str(tmp_path / "b.jsonl.gz"), 2)]
    assert [(row["file"], row["line"]) for row in bad] == places
    pairs = [PreferencePair.from_row(row) for row in written(out)]
    assert [pair.prompt[0].content for pair in pairs] == [row["prompt"] for row in rows] + [
        "last",
        "Hi?",
    ]
    assert pairs[400].source == f"{tmp_path / 'a.jsonl'}:402"
    assert pairs[-1].source == f"{tmp_path / 'c.parquet'}:301"
    assert len(list(out.iterdir())) > 4


def test_ingest_from_a_bucket(cluster, bucket, tmp_path, monkeypatch):
    """The cluster is older than the AWS variables: endpoint and keys must come with the work."""
    for module in (files, ingestion):
        monkeypatch.setattr(module, "PART_BYTES", 700)
    monkeypatch.setattr(s3, "_BUFFER", 256)
    report = ingest("s3://acme/shards", "pairs", tmp_path / "out", tmp_path / "bad.jsonl")
    assert (report.rows, report.bad, report.duplicates) == (300, 1, 1)
    pairs = [PreferencePair.from_row(row) for row in pq.read_table(tmp_path / "out").to_pylist()]
    assert [pair.prompt[0].content for pair in pairs] == [f"é{i}?" for i in range(300)]
    assert pairs[-1].source == "s3://acme/shards/deep/c.parquet:100"
    (bad,) = map(json.loads, (tmp_path / "bad.jsonl").open())
    assert (bad["file"], bad["line"]) == ("s3://acme/shards/a.jsonl", 101)


def test_ingest_streams_a_dataset(cluster, dataset, tmp_path):
    out, bad = tmp_path / "out", tmp_path / "bad.jsonl"
    report = ingest("hf://acme/prefs", "messages", out, bad, max_bad_fraction=0.1)
    assert (report.rows, report.bad, report.duplicates) == (30, 1, 1)
    pairs = [PreferencePair.from_row(row) for row in pq.read_table(out).to_pylist()]
    assert [pair.prompt[0].content for pair in pairs] == [f"{i}?" for i in range(30)]
    assert pairs[15].source == "hf://acme/prefs:16"  # rows count through the whole split
    (row,) = map(json.loads, bad.open())
    assert (row["file"], row["line"]) == ("hf://acme/prefs", 32)
    assert len(list(read_pairs(locate("hf://acme/prefs:test"), "messages"))) == 1


def test_ingest_refuses(cluster, tmp_path):
    out, quarantine = tmp_path / "pairs.parquet", tmp_path / "bad.jsonl"
    path = write_jsonl(tmp_path / "b.jsonl.gz", [GOOD, b"{", GOOD | {"prompt": "last"}])
    with pytest.raises(DataError, match="1 of 3 rows are malformed") as caught:
        ingest(path, "pairs", out, quarantine)
    assert "b.jsonl.gz:2: (row): is not JSON" in str(caught.value)
    assert len(quarantine.read_text().splitlines()) == 1
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(json.dumps(GOOD).encode() * 1)[:-8])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz: its gzip stream"):
        ingest(cut, "pairs", out, quarantine, max_bad_fraction=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.jsonl.gz", "bad.jsonl", "cut.jsonl.gz"]


@pytest.mark.parametrize("name", ["data.parquet", "data.jsonl"])
def test_unknown_columns_are_named_before_anything_is_read(tmp_path, name):
    path = tmp_path / name
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([{"question": "a", "good": "b", "bad": "c"}]), path)
    else:
        write_jsonl(path, [b"", b"{", {"question": "a", "bad": "c"}, {"good": "b"}])
    for schema, missing in (
        ("pairs", "chosen, rejected"),
        ({"chosen": "good", "rejected": "x"}, "x"),
    ):
        with pytest.raises(DataError, match="its columns are bad, good, question: name") as caught:
            ingest(path, schema, tmp_path / "out", tmp_path / "bad.jsonl")
        assert f"{path} has no column {missing}" in str(caught.value)


KILLED = """
import sys
from pathlib import Path
from trace_ray.data.ingest import ingest
from trace_ray.runtime.cluster import connected
folder = Path(sys.argv[1])
with connected():
    print(ingest(folder / "in.jsonl", "pairs", folder / "pairs.parquet", folder / "bad.jsonl").rows)
"""


def test_killed_midway_leaves_nothing_half_written(cluster, tmp_path):
    rows = (GOOD | {"prompt": f"{i}?"} for i in range(40_000))
    write_jsonl(tmp_path / "in.jsonl", [*rows, b"{"])
    address = ray.get_runtime_context().gcs_address
    env = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": address}
    killed = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], env=env)
    limit = time.monotonic() + 180
    while not list(tmp_path.glob(".pairs.parquet.*/parsed/.*.parquet*")):
        assert killed.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "pairs.parquet").exists()
    assert not (tmp_path / "bad.jsonl").exists()
    report = ingest(
        tmp_path / "in.jsonl", "pairs", tmp_path / "pairs.parquet", tmp_path / "bad.jsonl"
    )
    assert (report.rows, report.bad) == (40_000, 1)
    assert len(written(tmp_path / "pairs.parquet")) == 40_000
