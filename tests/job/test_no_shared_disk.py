"""A fleet whose nodes share no disk: storage and models in a bucket, the registry on a server."""

import contextlib
import getpass
import json
import os
import pwd
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import boto3
import pytest
import requests
import yaml
from cluster_of_nodes import BIN, can_unshare, cluster, free_port, process, wait_until
from small_fleet import ROOT, command, make_fleet, trace_ray

pytestmark = pytest.mark.skipif(not can_unshare(), reason="needs mount namespaces of its own")
URL = "s3://acme-nodes/trace"
KILLS = int(os.environ.get("TRACE_RAY_NODE_KILLS", "0"))
SEED = 7


@pytest.fixture(scope="module")
def s3(s3_environment):
    client = boto3.client("s3")
    client.create_bucket(Bucket="acme-nodes")
    return client


@contextlib.contextmanager
def postgres(at):
    """Yield the address of an empty Postgres database; a sqlite file's where Postgres isn't installed."""
    user = "postgres" if os.getuid() == 0 else getpass.getuser()
    if shutil.which("initdb") is None or (os.getuid() == 0 and not _is_user(user)):
        yield f"sqlite:///{at}/mlflow.db"
        return
    # Postgres refuses to run as root; its folder must be reachable for its own user.
    as_user = ["runuser", "-u", user, "--"] if os.getuid() == 0 else []
    with tempfile.TemporaryDirectory(prefix="trace-ray-pg-") as folder:
        shutil.chown(folder, user)
        data, port = Path(folder, "data"), free_port()
        initdb = [*as_user, "initdb", "-D", str(data), "-A", "trust", "-U", "mlflow"]
        subprocess.run(initdb, check=True, capture_output=True)
        server = [*as_user, "postgres", "-D", str(data), "-p", str(port), "-k", folder]
        with process([*server, "-c", "listen_addresses=127.0.0.1"], at / "postgres.log"):
            wait_until(lambda: "ready to accept" in (at / "postgres.log").read_text())
            yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"


def _is_user(name):
    try:
        return pwd.getpwnam(name) is not None
    except KeyError:
        return False


@pytest.fixture(scope="module")
def registry(s3, tmp_path_factory):
    at = tmp_path_factory.mktemp("mlflow")
    with postgres(at) as database:
        yield from mlflow_server(at, database)


def mlflow_server(at, database):
    port = free_port()
    argv = [str(BIN / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--workers", "1", "--backend-store-uri", database]
    argv += ["--artifacts-destination", "s3://acme-nodes/mlflow"]
    with process(argv, at / "log"):
        wait_until(lambda: "startup complete" in (at / "log").read_text(), 120)
        yield f"http://127.0.0.1:{port}"


def keys(s3, prefix):
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket="acme-nodes", Prefix=prefix)
    return {
        item["Key"].removeprefix(prefix): item["LastModified"]
        for page in pages
        for item in page.get("Contents", [])
    }


@pytest.fixture(scope="module")
def fleet(s3, registry, tmp_path_factory):
    """A fleet of one: its model in the bucket, its held-out prompts measured."""
    at = tmp_path_factory.mktemp("nodes")
    config = yaml.safe_load(make_fleet(at, ("one",)).read_text())
    (model,) = config["models"]
    for file in Path(model["base"]).iterdir():
        s3.upload_file(str(file), "acme-nodes", f"models/one/{file.name}")
    shutil.rmtree(model["base"])
    model["base"] = "s3://acme-nodes/models/one"
    config["training"] |= {"max_steps": 4, "save_steps": 2}
    config["evaluation"] = {"prompts": "heldout.jsonl", "max_new_tokens": 4}
    config |= {"storage": f"{URL}/a", "tracking": {"uri": registry}}
    prompts = [{"prompt": f"What is {n}?", "bin": "invert"} for n in range(2)]
    (at / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (at / "fleet.yaml").write_text(yaml.safe_dump(config))
    return at / "fleet.yaml"


@pytest.fixture(scope="module")
def nodes(s3, tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("cluster")) as found:
        yield found


@pytest.fixture(scope="module")
def applied(fleet, nodes):
    done = trace_ray("apply", fleet, timeout=1200, **nodes.env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def result_in(s3, storage):
    """What the run's record in the bucket says of the model."""
    (name,) = (key for key in keys(s3, f"trace/{storage}/runs/") if key.endswith("models/one.json"))
    body = s3.get_object(Bucket="acme-nodes", Key=f"trace/{storage}/runs/{name}")["Body"]
    return json.loads(body.read())


def test_all_that_a_run_made_is_in_the_bucket(applied, s3, nodes):
    found = keys(s3, "trace/a/")
    stages = {key.split("/")[1] for key in found if key.endswith("/stage.json")}
    assert stages == {"pairs", "overlap", "triage", "scores", "adapters", "measures"}
    assert not [key for key in found if ".tmp-" in key], "drafts of workers stay behind"
    left = [key for key in found if key.startswith(("train/", "state/trace/lock"))]
    assert not [key for key in left if key[-1] != "/"]
    assert {"latest", "audit/chain.jsonl", "state/trace/journal.json"} <= found.keys()
    assert result_in(s3, "a")["registered_as"] == "trace-one/1"
    cache = Path(nodes.env["TRACE_RAY_CACHE"])
    assert not list(cache.glob("*/models/*")), "the head needs no model"


def test_another_machine_sees_it_and_has_nothing_to_do(applied, fleet, s3, nodes, tmp_path):
    """A driver whose copy of the storage is empty."""
    before = keys(s3, "trace/a/stages/")
    env = nodes.env | {"TRACE_RAY_CACHE": str(tmp_path)}
    shown = trace_ray("status", fleet, **env)
    assert "done" in shown.stdout
    planned = trace_ray("plan", fleet, **env)
    assert "0 realign, 1 no change" in planned.stdout, planned.stdout + planned.stderr
    told = trace_ray("lineage", result_in(s3, "a")["adapter_id"], "--config", fleet, **env)
    assert told.returncode == 0, told.stderr
    assert keys(s3, "trace/a/stages/") == before


def test_a_node_that_has_nothing_serves_what_was_realigned(applied, fleet, nodes, s3, tmp_path):
    """Base, adapter and rollout come out of the bucket and the registry; the records go there."""
    served = yaml.safe_load(fleet.read_text())
    served["serve"] = {"compliance": {"mode": "annotate"}, "records": {"rows": 1}}
    config = fleet.with_name("served.yaml")
    config.write_text(yaml.safe_dump(served))
    port, log = free_port(), tmp_path / "serve.log"
    with process(command("serve", config, "--port", port), log, **nodes.env) as server:
        wait_until(lambda: "ready: http" in log.read_text(), 240)
        asked = requests.post(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json={"model": "one", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
            timeout=60,
        )
        assert asked.status_code == 200, asked.text
        assert asked.headers["x-trace-ray-adapter"] == result_in(s3, "a")["adapter_id"]
        assert asked.json()["compliance"]["verdicts"][0]["label"] in ("complies", "violates")
        ready = requests.get(f"http://127.0.0.1:{port}/readyz", timeout=30).json()
        assert (ready["status"], ready["registry"]["problem"]) == ("ok", ""), ready
        wait_until(lambda: keys(s3, "trace/a/records/"))
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 0
    assert "stopping" in log.read_text()


@pytest.mark.skipif(not KILLS, reason="set TRACE_RAY_NODE_KILLS: a kill takes minutes")
def test_a_node_killed_at_any_moment_changes_nothing(applied, fleet, nodes, s3):
    """SIGKILL of a whole node, the same command again where the run failed: the same adapter."""
    undisturbed, rng = result_in(s3, "a"), random.Random(SEED)
    for kill in range(KILLS):
        env = os.environ | nodes.env | {"TRACE_RAY_STORAGE": f"{URL}/k{kill}"}
        run = subprocess.Popen(command("apply", fleet), cwd=ROOT, env=env)
        moment, which = rng.uniform(5, 60), rng.randrange(len(nodes.up))
        time.sleep(moment)
        nodes.kill(which)
        nodes.add()
        ended = run.wait(timeout=1200)
        if ended != 0:
            done = trace_ray(
                "apply", fleet, timeout=1200, TRACE_RAY_STORAGE=f"{URL}/k{kill}", **nodes.env
            )
            assert done.returncode == 0, (moment, done.stderr)
        found = result_in(s3, f"k{kill}")
        print(f"killed node {which} after {moment:.0f} s: first run ended with {ended}")
        for name in ("adapter_sha256", "registered_as", "measures"):
            assert found[name] == undisturbed[name], (moment, name)
