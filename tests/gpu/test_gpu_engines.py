"""vLLM, the whole job and an endpoint on a GPU, by configuration alone. Skipped without one."""

import json
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml

from trace_ray.config import EngineConfig
from trace_ray.data.synthetic import generate
from trace_ray.models.adapters import adapter_sha256
from trace_ray.models.chat import encode_prompt
from trace_ray.models.engine import AdapterPath, Engine
from trace_ray.models.families import load_tokenizer
from trace_ray.models.fingerprint import take_fingerprint, write_fingerprint
from trace_ray.models.policy_model import load_measured_model
from trace_ray.serve.config import Compliance, ServeConfig, ServedAdapter, ServedJudge, ServedModel
from trace_ray.testing import tiny_adapter, tiny_model
from trace_ray.types import Message

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ROOT = Path(__file__).parents[2]
SIDES = ("chosen", "rejected")
ENGINE = {"max_model_len": 1024, "gpu_memory_utilization": 0.2}
LORA = {"r": 8, "alpha": 16, "dropout": 0, "targets": ["q_proj", "v_proj"]}
CLAUSES = [
    {"id": "no-upsell", "text": "Never push a paid plan.", "checks": {"must_not_match": "upgrade"}}
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("base"), seed=1)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Two adapters, each with the record of what it changes."""
    found = []
    for seed in (2, 3):
        path = tiny_adapter(tmp_path_factory.mktemp("adapter"), base, seed=seed)
        model = load_measured_model(base, None, str(path))
        probes = take_fingerprint(model, load_tokenizer(base), torch.bfloat16)
        write_fingerprint(path, probes)
        found.append(path)
    return found


def test_an_engine_answers_as_the_model_does_with_and_without_adapters(base, adapters):
    tokenizer = load_tokenizer(base)
    texts = ["Who are you?", "What does it cost, and for how many of us?", "Why?"]
    asked = [encode_prompt(tokenizer, (Message("user", text),)) for text in texts]
    yes, no = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("Yes", "No"))
    engine = Engine(str(base), EngineConfig(**ENGINE), lora=True)
    try:
        paths = [AdapterPath(path.name, str(path)) for path in adapters]
        mixed = [None, *paths, None]
        prompts = [ids for ids in asked for _ in mixed]
        got = torch.tensor(engine.judge(prompts, yes, no, mixed * len(asked)))
        words = engine.generate(asked, 8, adapter=paths[0])
        assert len(words) == len(asked)
        samples = engine.sample(asked, 3, 1.0, 8)
        assert [len(each) for each in samples] == [3] * len(asked)
    finally:
        engine.close()
    model = load_measured_model(base, str(adapters[0]), str(adapters[1]))
    expected = []
    for ids in asked:
        inputs = torch.tensor([ids], device="cuda")
        for name in (None, "ref", "default", None):
            with torch.no_grad():
                if name is None:
                    with model.disable_adapter():
                        logits = model(input_ids=inputs).logits
                else:
                    model.set_adapter(name)
                    logits = model(input_ids=inputs).logits
            expected.append(logits[0, -1].log_softmax(-1)[[yes, no]].tolist())
    # bfloat16 against float32, at random weights.
    assert (got - torch.tensor(expected)).abs().max() < 0.25


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """Two models, data, and the configs to deploy them and to realign them."""
    at = tmp_path_factory.mktemp("fleet")
    shift = generate(seed=0)
    for version in ("1", "2"):
        policy = {"id": "acme", "version": version, "clauses": CLAUSES}
        (at / f"policy-{version}.yaml").write_text(yaml.safe_dump(policy))
    write_jsonl(
        at / "pairs.jsonl",
        [
            {"prompt": g.pair.prompt[0].content} | {s: getattr(g.pair, s) for s in SIDES}
            for g in shift.pairs[:24]
        ],
    )
    write_jsonl(
        at / "labels.jsonl",
        [
            {
                "prompt": label.row.prompt[0].content,
                "response": label.row.response,
                "verdict": "violates" if label.row.violates else "complies",
                "group": label.row.group,
            }
            for label in shift.labels[:60]
        ],
    )
    write_jsonl(
        at / "heldout.jsonl",
        [{"prompt": item.prompt[0].content, "bin": str(item.bin)} for item in shift.heldout[:9]],
    )
    resources = {"num_cpus": 1, "num_gpus": 0.4}
    models = [
        {
            "name": name,
            "base": str(tiny_model(at / name, name, seed=seed)),
            "resources": resources,
            "engine": ENGINE,
        }
        for seed, name in enumerate(("llama", "qwen2"))
    ]
    training = {"max_steps": 3, "batch_size": 4, "lora": LORA, "learning_rate": 0.01}
    common = {"data": {"source": "pairs.jsonl"}, "storage": str(at / "storage")}
    deploy = common | {
        "policy": "policy-1.yaml",
        "models": models,
        "training": training | {"objective": "sft"},
        "tracking": {"alias": "champion"},
    }
    judge = {"model": str(at / "llama"), "labels": "labels.jsonl", "min_auc": 0}
    judge |= {"fit": {"epochs": 1}, "resources": resources, "engine": ENGINE}
    realign = common | {
        "policy": "policy-2.yaml",
        "models": [m | {"adapter": f"models:/trace-{m['name']}@champion"} for m in models],
        "judge": judge,
        "training": training | {"impact": {"gold_batch": 6}},
        "evaluation": {"prompts": "heldout.jsonl", "max_new_tokens": 8, "blimp_pairs": 10},
    }
    (at / "deploy.yaml").write_text(yaml.safe_dump(deploy))
    (at / "realign.yaml").write_text(yaml.safe_dump(realign))
    return at


def test_the_whole_job(fleet):
    for name in ("deploy", "realign", "realign"):
        command = [sys.executable, "jobs/realign_fleet.py", "--config", fleet / f"{name}.yaml"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
    report = json.loads((fleet / "storage" / "latest" / "report.json").read_text())
    assert report["failed"] == {}
    assert report["triage"]["pairs"] == 24
    assert report["triage"]["unjudged"] == 0
    assert [model["name"] for model in report["models"]] == ["llama", "qwen2"]
    assert all(model["parent_adapter"] for model in report["models"])


@pytest.fixture(scope="module")
def url(base, adapters, tmp_path_factory):
    from trace_ray.serve import app

    policy = tmp_path_factory.mktemp("policy") / "policy.yaml"
    policy.write_text(yaml.safe_dump({"id": "acme", "version": "1", "clauses": CLAUSES}))
    first, second = (
        ServedAdapter(id=f"support@{n}", path=str(path), sha256=adapter_sha256(path))
        for n, path in enumerate(adapters)
    )
    judge = ServedJudge(
        id="judge", base=str(base), path=second.path, sha256=second.sha256, threshold=0
    )
    judged = Compliance(mode="annotate", policy=str(policy), judge=judge)
    config = ServeConfig(
        models=[
            ServedModel(name="support", base=str(base), adapters=[first, second], compliance=judged)
        ],
        engine=EngineConfig(**ENGINE | {"enforce_eager": False}),
        num_gpus=0.4,
        require_fingerprint=True,
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        app.start(config, port=port)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        app.stop()


def test_an_endpoint_proves_its_adapters_answers_and_judges(url):
    def post(path, body):
        request = urllib.request.Request(
            f"{url}/{path}", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.headers, json.load(answer)

    messages = [{"role": "user", "content": "What does it cost?"}]
    ask = {"messages": messages, "max_tokens": 8, "temperature": 0, "logprobs": True}
    answers = {}
    for name in ("support@0", "support@1", "support@base"):
        _, body = post("chat/completions", ask | {"model": name})
        assert body["usage"]["completion_tokens"] > 0
        assert body["compliance"]["verdicts"]
        answers[name] = body["choices"][0]["logprobs"]["content"][0]["logprob"]
    assert len(set(answers.values())) == 3
    check = {"model": "support", "messages": messages, "response": "Please upgrade."}
    assert post("compliance/check", check)[1]["label"] == "violates"
