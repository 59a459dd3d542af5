"""The registry on a real MLflow: sqlite and files."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from trace_ray.errors import ModelError, RegistryError
from trace_ray.models.adapters import adapter_sha256, check_adapter, read_base_digest
from trace_ray.runtime.fleet_aliases import FleetAliases
from trace_ray.runtime.registry import AdapterRecord, Registry, default_uri

CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["v_proj", "q_proj"],
    "base_model_name_or_path": "/some/where",
}


def write_adapter(folder: Path, seed: int = 0, **config) -> Path:
    folder.mkdir(parents=True)
    weight = np.random.default_rng(seed).normal(size=(2, 4)).astype(np.float32)
    save_file(
        {"base_model.model.q_proj.lora_A.weight": weight}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder


def record(adapter: Path, **changes) -> AdapterRecord:
    sha256 = adapter_sha256(adapter)
    base = AdapterRecord(
        name="support",
        adapter_dir=adapter,
        adapter_id=f"support@2026.2-{sha256[:8]}",
        adapter_sha256=sha256,
        policy_id="acme",
        policy_version="2026.2",
        policy_digest="p" * 64,
        data_digest="d" * 64,
        base="demo:smollm2",
        base_revision="",
        base_digest="b" * 64,
        parent_adapter="",
        objective="trace",
        alias="challenger",
        params={"beta": 0.3},
        metrics={"tpa_after": 0.9},
        history=[{"step": s, "timestamp_ms": 1000 + s, "loss": 1 / (s + 1)} for s in range(3)],
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def registry(storage):
    return Registry(default_uri(storage))


def test_register_resolve_and_reuse(registry, storage, tmp_path):
    artifact = tmp_path / "gold_batch.json"
    artifact.write_text("[]")
    adapter = write_adapter(tmp_path / "a")
    first = registry.register(record(adapter, artifacts=[artifact]))
    assert first.registered_as == "trace-support/1"
    assert first.aliases == ("challenger",)
    assert not first.reused
    assert first.tags["base_digest"] == "b" * 64
    assert first.tags["parent_adapter"] == ""

    again = registry.register(record(adapter, alias="champion"))
    assert (again.version, again.run_id, again.reused) == (1, first.run_id, True)
    assert again.aliases == ("challenger", "champion")

    other = registry.register(record(write_adapter(tmp_path / "b", seed=1)))
    assert other.version == 2
    assert [v.aliases for v in registry.versions("trace-support")] == [
        ("champion",),
        ("challenger",),
    ]

    client = registry._client
    assert [m.value for m in client.get_metric_history(first.run_id, "loss")] == [1, 1 / 2, 1 / 3]
    run = client.get_run(first.run_id)
    assert run.data.params == {"beta": "0.3"}
    assert run.data.metrics["tpa_after"] == 0.9
    assert run.info.status == "FINISHED"
    assert [a.path for a in client.list_artifacts(first.run_id)] == ["gold_batch.json"]
    assert (storage / "mlartifacts").is_dir()

    cache = tmp_path / "cache"
    for reference in ("models:/trace-support@champion", "models:/trace-support/1"):
        found = registry.resolve(reference, cache)
        assert found.sha256 == adapter_sha256(adapter) == adapter_sha256(found.path)
        assert found.adapter_id == first.tags["adapter_id"]
        assert found.base_digest == read_base_digest(found.path) == "b" * 64
        assert found.registered_as == "trace-support/1"
    assert [p.name for p in cache.iterdir()] == [found.sha256[:16]]

    # A damaged cache is fetched again; changed artifacts are refused.
    config = found.path / "adapter_config.json"
    config.write_text(json.dumps(CONFIG | {"lora_alpha": 400}))
    assert adapter_sha256(registry.resolve("models:/trace-support/1", cache).path) == found.sha256
    source = client.get_model_version("trace-support", "1").source
    stored = Path(source.removeprefix("file://"), "adapter_config.json")
    assert stored.is_relative_to(storage / "mlartifacts")
    stored.write_text(json.dumps(CONFIG | {"lora_alpha": 400}))
    with pytest.raises(RegistryError, match="someone changed them"):
        registry.resolve("models:/trace-support/1", tmp_path / "cache2")
    assert not list((tmp_path / "cache2").iterdir())


def test_same_adapter_under_another_policy_is_another_version(registry, tmp_path):
    adapter = write_adapter(tmp_path / "a", seed=5)
    one = registry.register(record(adapter, name="other", alias=""))
    two = registry.register(record(adapter, name="other", alias="", policy_digest="q" * 64))
    assert (one.version, two.version) == (1, 2)
    assert one.aliases == ()


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("models:/trace-nobody@champion", "nobody registered trace-nobody"),
        ("models:/trace-known@champion", "has no alias 'champion'; it has challenger"),
        ("models:/trace-known/7", "has versions 1"),
        ("models:/trace-known", "write models:/name@alias"),
    ],
)
def test_what_is_not_there(registry, tmp_path, reference, text):
    registry.register(record(write_adapter(tmp_path / "a", seed=9), name="known"))
    with pytest.raises(RegistryError, match=text):
        registry.resolve(reference, tmp_path / "cache")


def test_directory(registry, tmp_path):
    adapter = write_adapter(tmp_path / "mine")
    found = registry.resolve(str(adapter), tmp_path)
    assert found.adapter_id == f"mine-{found.sha256[:8]}"
    assert found.base_digest is None
    with pytest.raises(ModelError, match="no such adapter directory"):
        registry.resolve(str(tmp_path / "none"), tmp_path)


def test_server_that_does_not_answer():
    with pytest.raises(RegistryError, match="no MLflow server answers"):
        Registry("http://127.0.0.1:9")


@pytest.mark.parametrize("scheme", ["http", "postgresql+pg8000"])
def test_no_message_tells_a_password(scheme):
    with pytest.raises(RegistryError, match=r"://fleet:\*\*\*@127\.0\.0\.1:9") as caught:
        Registry(f"{scheme}://fleet:s3cr@t@127.0.0.1:9/db")
    assert "s3cr" not in str(caught.value)


def test_a_storage_s_folder_may_have_any_name(tmp_path):
    storage = tmp_path / "50% off? #1"
    made = Registry(default_uri(storage))
    assert made.registered_name("a") == "trace-a"
    assert made.versions("trace-a") == []
    assert FleetAliases(made.uri, "trace").read() == {}
    assert (storage / "mlflow.db").is_file()


def test_failed_registration_leaves_no_version(registry, tmp_path):
    adapter = write_adapter(tmp_path / "a", seed=11)
    with pytest.raises(RegistryError, match="can't be registered"):
        registry.register(record(adapter, name="broken", artifacts=[tmp_path / "none.json"]))
    assert registry.versions("trace-broken") == []
    changed = record(adapter, name="broken", adapter_sha256="0" * 64)
    with pytest.raises(RegistryError, match="changed since it was trained"):
        registry.register(changed)


RACER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_registry import Registry, default_uri, record, write_adapter
storage, seed = Path(sys.argv[2]), int(sys.argv[3])
adapter = write_adapter(storage / f"adapter{seed}", seed=seed)
print(Registry(default_uri(storage / "db")).register(record(adapter)).version)
"""


def test_two_processes_register_at_once(tmp_path):
    command = [sys.executable, "-c", RACER, str(Path(__file__).parent), str(tmp_path)]
    racers = [
        subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for seed in range(2)
    ]
    results = [racer.communicate(timeout=360) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], results
    assert sorted(out.strip() for out, _ in results) == [b"1", b"2"]


def test_sha256_is_of_the_function(tmp_path):
    plain = adapter_sha256(write_adapter(tmp_path / "a"))
    moved = {"base_model_name_or_path": "/else", "target_modules": ["q_proj", "v_proj"]}
    assert adapter_sha256(write_adapter(tmp_path / "b", lora_dropout=0.1, **moved)) == plain
    assert adapter_sha256(write_adapter(tmp_path / "c", use_rslora=True)) != plain
    assert adapter_sha256(write_adapter(tmp_path / "d", lora_alpha=8)) != plain
    assert adapter_sha256(write_adapter(tmp_path / "e", seed=1)) != plain


def test_check_adapter_names_every_problem(tmp_path):
    adapter = write_adapter(tmp_path / "a", use_dora=True, modules_to_save=["lm_head"])
    (adapter / "trace_ray.json").write_text('{"base_digest": "aaaaaaaaaa"}')
    with pytest.raises(ModelError) as caught:
        check_adapter(adapter, "bbbbbbbbbb")
    for text in ("DoRA", "modules_to_save", "another base model"):
        assert text in str(caught.value)
    # Loaded as the trained adapter and as the reference, it would change the base's weights twice.
    with pytest.raises(ModelError, match="init_lora_weights 'pissa_niter_4' changes the base"):
        check_adapter(write_adapter(tmp_path / "pissa", init_lora_weights="pissa_niter_4"))
    check_adapter(write_adapter(tmp_path / "gaussian", init_lora_weights="gaussian"))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickled"):
        check_adapter(adapter)
    cut = write_adapter(tmp_path / "cut")
    whole = (cut / "adapter_model.safetensors").read_bytes()
    (cut / "adapter_model.safetensors").write_bytes(whole[:-4])
    with pytest.raises(ModelError, match="not a complete safetensors"):
        check_adapter(cut)
    check_adapter(write_adapter(tmp_path / "good"), "bbbbbbbbbb")


def test_the_aliases_of_a_fleet_are_one_look(registry, storage, tmp_path):
    adapter = write_adapter(tmp_path / "look", seed=70)
    first = registry.register(record(adapter, name="seen", alias="champion"))
    reader = FleetAliases(registry.uri, "trace")
    assert reader.read()["trace-seen"] == {"champion": first.version}
    registry.set_alias("trace-seen", "challenger", first.version)
    assert reader.read()["trace-seen"] == {"champion": 1, "challenger": 1}
    assert FleetAliases(registry.uri, "other").read() == {}
    gone = FleetAliases(default_uri(tmp_path / "none"), "trace")
    with pytest.raises(RegistryError, match="the file is gone"):
        gone.read()
    with pytest.raises(RegistryError, match="no MLflow server answers"):
        FleetAliases("http://127.0.0.1:9", "trace").read()
