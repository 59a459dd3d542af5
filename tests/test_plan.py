"""Estimates of a plan and the check of its inputs, without a cluster."""

import json
from pathlib import Path

import pytest
import yaml

from trace_ray.config import load_config
from trace_ray.errors import ConfigError
from trace_ray.models.references import resolve_model
from trace_ray.rollout import estimate
from trace_ray.rollout.lineage import keep_policy, kept_policy
from trace_ray.rollout.model_job import ADAPTERS, SCORES, Deployed, ModelJob
from trace_ray.rollout.plan import read_inputs
from trace_ray.rollout.plan_file import Expected, input_digests, read_plan, write_plan
from trace_ray.runtime.progress import Reporter
from trace_ray.runtime.store import write_json
from trace_ray.testing import tiny_model


@pytest.fixture
def job(tmp_path):
    """A model of a fleet, ready to be estimated."""
    base = tiny_model(tmp_path / "model")
    clause = {"id": "a", "text": "Never say foo.", "checks": {"must_not_match": "foo"}}
    policy = {"id": "p", "version": "2", "clauses": [clause]}
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(policy))
    row = {"prompt": "q", "chosen": "foo", "rejected": "bar"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    config = {
        "policy": "policy.yaml",
        "data": {"source": "pairs.jsonl"},
        "judge": {"kind": "rules"},
        "models": [{"name": "one", "base": str(base)}],
        "training": {"lora": {"r": 8}, "batch_size": 4},
        "storage": str(tmp_path / "storage"),
    }
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(config))
    inputs = read_inputs(str(tmp_path / "fleet.yaml"))
    source = resolve_model(str(base), None, inputs.store.models)
    deployed = Deployed("/nowhere", "one@1-aa", "ff")
    reporter = Reporter(None, "one")
    return ModelJob(inputs, inputs.config.models[0], source, deployed, "p", "t", reporter)


def test_sizes_are_read_from_the_headers(job):
    shape = estimate.shape_of(Path(job.base_dir), ["q_proj", "v_proj"])
    # Two layers, hidden 64, 2 heads of 32, 1 kv head: q 64 -> 64, v 64 -> 32.
    assert shape.adapted == 2 * ((64 + 64) + (64 + 32))
    mlp, attention = 3 * 64 * 128, 2 * 64 * 64 + 2 * 64 * 32
    assert shape.parameters == 2 * (mlp + attention + 2 * 64) + 320 * 64 + 64


def test_memory_grows_with_the_batch_and_shrinks_with_checkpointing(job):
    shape = estimate.Shape(7_000_000_000, 4096, 32, 32_000, 100_000)
    plain = estimate.training_memory(job, shape, 1000)
    assert plain.weights == 28_000_000_000
    assert plain.adapter == 100_000 * 8 * 4 * 5  # with gradient, two moments and the reference
    assert plain.activations == 4000 * (4096 * 33 * 17 + 64_000) * 4
    training = job.model.training.model_copy(update={"gradient_checkpointing": True})
    model = job.model.model_copy(update={"training": training})
    less = estimate.training_memory(
        ModelJob(job.inputs, model, job.source, job.deployed, "p", "t", job.reporter), shape, 1000
    )
    assert less.activations == 4000 * (4096 * 49 + 64_000) * 4


def test_a_sharded_base_takes_its_share_a_layer_and_the_embeddings(job):
    shape = estimate.Shape(64_000_000_000, 8192, 80, 100_000, 100_000)
    sharing = {"workers": 8, "batch_size": 8, "shard_base": True, "base_dtype": "bfloat16"}
    training = job.model.training.model_copy(update=sharing)
    model = job.model.model_copy(update={"training": training})
    memory = estimate.training_memory(
        ModelJob(job.inputs, model, job.source, job.deployed, "p", "t", job.reporter), shape, 1000
    )
    assert memory.weights == 2 * (8_000_000_000 + 800_000_000 + 819_200_000)


def test_an_earlier_run_on_the_same_base_is_believed_before_arithmetic(job):
    shape = estimate.shape_of(Path(job.base_dir), "all-linear")
    units, tokens = {SCORES: 40, ADAPTERS: 80}, {SCORES: 100.0, ADAPTERS: 100.0}
    guessed = estimate.stage_costs(job, shape, units, tokens)
    assert "6 FLOP at" in guessed[ADAPTERS].basis

    def work(out):
        write_json(out / "summary.json", {"conflicts": 10})
        return 2.5

    job.inputs.store.stage(SCORES, {"base": job.source.digest}, work)
    job.inputs.store.stage(SCORES, {"base": "another"}, work)
    known = estimate.stage_costs(job, shape, units, tokens)[SCORES]
    assert known.seconds == pytest.approx(40 * 2.5 / 10)
    assert "2.5 s for 10; 40 now" in known.basis


def test_a_plan_holds_for_its_inputs_alone(job, tmp_path):
    digests = input_digests(job.inputs)
    path = tmp_path / "plan.json"
    write_plan(path, {"config": "fleet.yaml", "digests": digests})
    expected = Expected(str(path), read_plan(str(path))["digests"])
    expected.require(digests)
    with pytest.raises(ConfigError, match=r"since it was planned: policy, data; plan again"):
        expected.require(digests | {"policy": "x", "data": "y"})
    path.write_text("{}")
    with pytest.raises(ConfigError, match="is not a plan"):
        read_plan(str(path))


def test_retries_and_parallel_are_no_part_of_a_run_s_identity(job, tmp_path):
    config = yaml.safe_load((tmp_path / "fleet.yaml").read_text())
    more = config | {"retries": {"attempts": 7}, "parallel": 1}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(more))
    again = read_inputs(str(tmp_path / "more.yaml"))
    assert load_config(tmp_path / "more.yaml").retries.attempts == 7
    assert again.run_id == job.inputs.run_id


def test_a_policy_is_found_again_by_its_digest(job):
    policy, root = job.inputs.policy, job.inputs.store.root
    assert kept_policy(root, policy.digest) is None
    keep_policy(root, policy)
    found = kept_policy(root, policy.digest)
    assert found is not None
    assert found.digest == policy.digest
