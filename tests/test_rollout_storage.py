"""What a rollout goes by in its storage: the chain's last word, and each fleet's own state."""

from types import SimpleNamespace

import pytest
import yaml
from rollout_fleet import (
    NAMES,
    NEW,
    OLD,
    aliases,
    as_gated,
    live,
    make_fleet,
    record,
    rollout,
    state_folder,
    with_waves,
    write_adapter,
)
from typer.testing import CliRunner

from trace_ray.cli import app
from trace_ray.config import load_config
from trace_ray.rollout.apply import audit_run
from trace_ray.runtime.audit_log import AuditLog
from trace_ray.runtime.registry import Registry, default_uri
from trace_ray.serve.config import Follow
from trace_ray.serve.follow import FleetSource

BETA = "beta"


@pytest.fixture
def fleet(tmp_path):
    return as_gated(make_fleet(tmp_path))


def end_of_apply(fleet, verdict, **limits):
    """What an apply under these limits of the gate adds to the chain."""
    path = fleet / "fleet.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"gate": limits}))
    models = []
    for name in NAMES:
        version = Registry(default_uri(fleet / "storage")).versions(f"trace-{name}")[1]
        made = {key: version.tags[key] for key in ("adapter_id", "adapter_sha256")}
        gate = {"verdict": verdict, "reasons": [f"the gate's {verdict}"]}
        made |= {"name": name, "registered_as": f"trace-{name}/2", "gate": gate}
        models.append(made | dict.fromkeys(("parent_adapter", "tpa_before", "tpa_after")))
    inputs = SimpleNamespace(
        config=load_config(path), policy=SimpleNamespace(digest="p"), data_digest="d", run_id="r"
    )
    audit_run(inputs, {"models": models, "failed": {}, "unchanged": {}})  # type: ignore[arg-type]


def chain(fleet):
    return AuditLog(fleet / "storage" / "audit").records()


def test_the_last_apply_decides_who_may_be_promoted(fleet):
    """Strict limits, lax ones, the strict ones again: the chain's last word is the last apply's."""
    before = len(chain(fleet))
    end_of_apply(fleet, "hold", min_prompts=500)
    end_of_apply(fleet, "promote", min_prompts=5)
    end_of_apply(fleet, "hold", min_prompts=500)
    end_of_apply(fleet, "hold", min_prompts=500)  # says nothing new
    assert len(chain(fleet)) == before + 3
    done = rollout(fleet, "promote")
    assert (done.exit_code, "the gate says hold" in done.output) == (2, True), done.output
    assert aliases(fleet, "one") == OLD
    end_of_apply(fleet, "hold", min_prompts=501)
    assert chain(fleet)[-1].evidence["gate_config"]["min_prompts"] == 501


def beside(fleet):
    """Write another fleet's config: in the same storage, under another prefix, with its own models."""
    registry = Registry(default_uri(fleet / "storage"), BETA)
    for number, name in enumerate(NAMES):
        first, second = (write_adapter(fleet / f"{BETA}-{name}{i}", 9 + number + i) for i in (1, 5))
        champion = record(first, name, "1", "champion")
        registry.register(champion)
        registry.register(record(second, name, "2", "champion", champion.adapter_id))
    gate = {"verdict": "promote", "reasons": []}
    rows = [{"name": n, "registered_as": f"{BETA}-{n}/2", "gate": gate} for n in NAMES]
    AuditLog(fleet / "storage" / "audit").append("realign", {}, {"models": rows})
    config = yaml.safe_load((fleet / "fleet.yaml").read_text())
    (fleet / "beta.yaml").write_text(
        yaml.safe_dump(config | {"tracking": {"registry_prefix": BETA}})
    )


def beta(fleet, command):
    return CliRunner().invoke(app, ["rollout", command, str(fleet / "beta.yaml")])


def splits(fleet, prefix):
    """How an endpoint of a fleet splits its traffic; None while a promotion is half done."""
    storage = fleet / "storage"
    view = FleetSource(Follow(uri=default_uri(storage), prefix=prefix, storage=str(storage))).view()
    return None if view is None else sorted(view.splits)


def test_two_fleets_of_one_storage_roll_out_side_by_side(fleet):
    with_waves(fleet)
    beside(fleet)
    assert splits(fleet, BETA) == []
    assert beta(fleet, "step").exit_code == 2, "no rollout of its own was started"
    for command in ("start", "pause"):
        done = beta(fleet, command)
        assert done.exit_code == 0, done.output
    assert (splits(fleet, "trace"), splits(fleet, BETA)) == (["one"], ["one"])
    live(fleet, "one", lambda i: i % 10 > 0)
    done = rollout(fleet, "step")
    assert "one: promote: compliance is not worse" in done.output, done.output
    assert aliases(fleet, "one") == NEW
    assert (splits(fleet, "trace"), splits(fleet, BETA)) == (["two"], ["one"])


def test_two_fleets_of_one_storage_watch_their_own_champions(fleet):
    beside(fleet)
    for name in ("fleet.yaml", "beta.yaml"):
        config = yaml.safe_load((fleet / name).read_text())
        config |= {"rollout": {"watch": {"floor": 0.8}}}
        (fleet / name).write_text(yaml.safe_dump(config))
    assert rollout(fleet, "watch").exit_code == 0
    kept = (state_folder(fleet) / "watch.json").read_text()
    assert beta(fleet, "watch").exit_code == 0
    assert (state_folder(fleet) / "watch.json").read_text() == kept
    mine, theirs = rollout(fleet, "status").output, beta(fleet, "status").output
    assert mine.count("watched: ") == theirs.count("watched: ") == 2
    assert mine != theirs


def test_state_of_an_earlier_version_is_moved_by_hand(fleet):
    """It doesn't say whose it is, and a fleet that overlooked its rollout would start another."""
    with_waves(fleet)
    state = state_folder(fleet) / "waves.json"
    old = state.rename(fleet / "storage" / "rollout" / "waves.json")
    refused = rollout(fleet, "status")
    assert (refused.exit_code, f"{old}: of an earlier version" in refused.output) == (2, True)
    assert f"move it to {state}" in refused.output
    old.rename(state)
    assert "wave 1, 0 s soaked" in rollout(fleet, "status").output
