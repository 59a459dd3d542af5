"""A bucket on a local S3 server, and a folder that ``hf://acme/prefs`` resolves to."""

import gzip
import json

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROWS = [{"prompt": f"é{i}?", "chosen": "Yes.", "rejected": "No."} for i in range(300)]


def jsonl(rows):
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\r\n" for row in rows)


@pytest.fixture
def client(s3_environment):
    return boto3.client("s3")


@pytest.fixture
def bucket(client, tmp_path):
    """Three forms of file under shards/, and neighbours that must not be read."""
    pq.write_table(pa.Table.from_pylist(ROWS[200:]), tmp_path / "c.parquet", row_group_size=20)
    client.create_bucket(Bucket="acme")
    for key, body in {
        "shards/a.jsonl": b"\xef\xbb\xbf" + jsonl(ROWS[:100]) + b"{\n" + jsonl(ROWS[:1]),
        "shards/deep/b.jsonl.gz": gzip.compress(jsonl(ROWS[100:200])),
        "shards/deep/c.parquet": (tmp_path / "c.parquet").read_bytes(),
        "shards/.hidden.jsonl": b"{",
        "shards/README.md": b"no data",
        "shards2/d.jsonl": b"{",
    }.items():
        client.put_object(Bucket="acme", Key=key, Body=body)
    yield client
    for item in client.list_objects_v2(Bucket="acme")["Contents"]:
        client.delete_object(Bucket="acme", Key=item["Key"])
    client.delete_bucket(Bucket="acme")


CONVERSATIONS = [
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
        rows = CONVERSATIONS[10 * number : 10 * number + 10]
        if number == 2:
            rows = [*rows, CONVERSATIONS[0], {"chosen": [], "rejected": []}]
        (folder / f"train-{number}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "test-0.jsonl").write_text(json.dumps(CONVERSATIONS[3]) + "\n")
    return folder
