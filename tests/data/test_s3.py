"""Sources in a bucket: a local S3 server, the real client."""

import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3
import pytest

from trace_ray.config import load_config
from trace_ray.data import s3
from trace_ray.data.files import locate
from trace_ray.data.sources import read_pairs
from trace_ray.errors import DataError
from trace_ray.rollout.plan import data_digest


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("s3://acme/shards", ["shards/a.jsonl", "shards/deep/b.jsonl.gz", "shards/deep/c.parquet"]),
        ("s3://acme/shards/deep/", ["shards/deep/b.jsonl.gz", "shards/deep/c.parquet"]),
        ("s3://acme/shards/deep/b", ["shards/deep/b.jsonl.gz"]),
        ("s3://acme/shards/a.jsonl", ["shards/a.jsonl"]),
        ("s3://acme/shards*/*.jsonl", ["shards/a.jsonl", "shards2/d.jsonl"]),
        ("s3://acme/shards/**/[bc].*", ["shards/deep/b.jsonl.gz", "shards/deep/c.parquet"]),
        ("s3://acme/shards/*/[!a-b].*", ["shards/deep/c.parquet"]),
        ("s3://acme/**/?.jsonl", ["shards/a.jsonl", "shards2/d.jsonl"]),
    ],
)
def test_keys_folders_prefixes_and_globs(bucket, source, names):
    assert [file.name for file in locate(source).files] == [f"s3://acme/{name}" for name in names]


def test_the_digest_needs_no_download(bucket, tmp_path):
    (tmp_path / "policy.yaml").write_text("")
    (tmp_path / "fleet.yaml").write_text(
        "policy: policy.yaml\ndata: {source: 's3://acme/shards'}\ntraining: {objective: sft}\n"
        f"models: [{{name: a, base: b}}]\nstorage: {tmp_path}\n"
    )
    config = load_config(tmp_path / "fleet.yaml")

    def digest():
        return data_digest(config, locate(config.data.source))

    first = digest()
    assert digest() == first
    bucket.put_object(Bucket="acme", Key="shards/a.jsonl", Body=b"{}")
    assert digest() != first


def test_an_object_replaced_while_it_is_read_is_noticed(bucket):
    source = locate("s3://acme/shards/a.jsonl")
    bucket.put_object(Bucket="acme", Key="shards/a.jsonl", Body=b"{}")
    with pytest.raises(DataError, match=r"a\.jsonl: .*replaced after it was listed; run again"):
        list(read_pairs(source, "pairs"))
    bucket.delete_object(Bucket="acme", Key="shards/a.jsonl")
    with pytest.raises(DataError, match="deleted after it was listed"):
        list(read_pairs(source, "pairs"))


def test_a_broken_parquet_object_names_itself(bucket):
    bucket.put_object(Bucket="acme", Key="shards/x.parquet", Body=b"PAR1 no")
    with pytest.raises(DataError, match=r"s3://acme/shards/x\.parquet: can't be read as parquet"):
        list(read_pairs(locate("s3://acme/shards/x.parquet"), "pairs"))


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("s3://none/shards", "there is no such bucket; check its name and AWS_ENDPOINT_URL"),
        ("s3://acme/nothing", r"no data file \(.*\) under it \(0 objects there\)"),
        ("s3://acme/shards/README.md", r"no data file .* \(1 objects there\)"),
        ("s3:///shards", "names no bucket"),
        ("s3://a b/shards", "can't be the name of a bucket"),
        ("gs://acme/shards", "must be a path, s3://bucket/prefix or hf://owner/name"),
    ],
)
def test_what_is_not_there_is_named(bucket, source, text):
    with pytest.raises(DataError, match=text) as caught:
        locate(source)
    assert str(caught.value).startswith(f"{source}: ")


def test_refusals_say_what_to_do(bucket, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="check AWS_ENDPOINT_URL and the network"):
        locate("s3://acme/shards")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(DataError, match="no AWS keys found; set AWS_ACCESS_KEY_ID"):
        locate("s3://acme/shards")


LISTED = b"""<ListBucketResult><Name>acme</Name><IsTruncated>false</IsTruncated>
<Contents><Key>a.jsonl</Key><Size>3</Size><ETag>"e"</ETag></Contents></ListBucketResult>"""
SLOW = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@pytest.fixture
def throttling(monkeypatch):
    """A bucket that answers 503 as often as the list says; it holds what it was asked."""
    left, asked = [0], []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            left[0] -= 1
            body = SLOW if left[0] >= 0 else LISTED
            self.send_response(503 if left[0] >= 0 else 200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        yield left, asked
        server.shutdown()
        thread.join()


def test_a_throttled_request_is_made_again(throttling):
    left, asked = throttling
    left[0] = 3
    found = s3.list_objects("s3://acme/a", s3.S3Access.from_environment())
    assert [name for name, _, _ in found] == ["s3://acme/a.jsonl"]
    assert len(asked) == 4


def test_a_bucket_that_always_throttles_says_so_and_what_to_do(throttling):
    left, asked = throttling
    left[0] = 1000
    with pytest.raises(DataError, match="S3 throttled the requests") as caught:
        s3.list_objects("s3://acme/a", s3.S3Access.from_environment())
    assert "run again later" in str(caught.value)
    assert "the network" not in str(caught.value)
    assert len(asked) == 5


def test_access_denied(s3_server, client, monkeypatch):
    """The server checks keys from here on, and ours are unknown to it, then allowed nothing."""
    client.create_bucket(Bucket="private")
    client.put_object(Bucket="private", Key="a.jsonl", Body=b"{}")
    iam = boto3.client("iam")
    iam.create_user(UserName="reader")
    keys = iam.create_access_key(UserName="reader")["AccessKey"]

    def check_after(calls):
        ask = urllib.request.Request(
            f"{s3_server}/moto-api/reset-auth",
            str(calls).encode(),
            headers={"content-type": "text/plain"},
        )
        urllib.request.urlopen(ask, timeout=10).read()

    check_after(0)
    try:
        with pytest.raises(DataError, match="does not know AWS_ACCESS_KEY_ID"):
            locate("s3://private/a.jsonl")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys["SecretAccessKey"])
        with pytest.raises(DataError, match="access denied; the keys need s3:ListBucket"):
            locate("s3://private/a.jsonl")
    finally:
        check_after("inf")


def test_keys_do_not_show_up_in_messages(client):
    assert "test" not in repr(s3.S3Access.from_environment())
