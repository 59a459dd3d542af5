"""Estimates of a plan and the check of its inputs, without a cluster."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import yaml

from trace_ray.config import JudgeConfig, ModelConfig, Resources, load_config
from trace_ray.config.oracle import VLLMOracle
from trace_ray.errors import ConfigError
from trace_ray.models.references import remembered_digest, resolve_model
from trace_ray.rollout import estimate
from trace_ray.rollout.judging import ask, people_said, verdict_store
from trace_ray.rollout.lineage import keep_policy, kept_policy
from trace_ray.rollout.measuring import answering
from trace_ray.rollout.model_job import ADAPTERS, SCORES, Deployed, ModelJob
from trace_ray.rollout.once import earned_judge
from trace_ray.rollout.parallel import is_live, keep_result, kept_results
from trace_ray.rollout.plan import read_inputs
from trace_ray.rollout.plan_file import (
    Expected,
    digests,
    input_digests,
    read_plan,
    write_plan,
)
from trace_ray.rollout.planning import CHANGES, FleetPlan, ModelPlan
from trace_ray.runtime.judges import Exchange
from trace_ray.runtime.progress import Reporter
from trace_ray.runtime.store import write_json
from trace_ray.runtime.verdict_store import CLAUSES, HUMAN
from trace_ray.serve.config import ServeConfig
from trace_ray.testing import tiny_adapter, tiny_model, tiny_task
from trace_ray.types import Label, Message, Verdict, response_id


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


def test_how_a_model_is_trained_is_no_input_of_the_adapter(job):
    def key(**changes):
        training = job.model.training.model_copy(update=changes)
        model = job.model.model_copy(update={"training": training})
        return dataclasses.replace(job, model=model).adapter_key("")

    assert key(compile=True) == key(save_steps=7) == key()
    assert key(beta=0.7) != key()


def test_a_sharded_base_takes_its_share_a_layer_and_the_embeddings(job):
    shape = estimate.Shape(64_000_000_000, 8192, 80, 100_000, 100_000)
    sharing = {"workers": 8, "batch_size": 8, "shard_base": True, "base_dtype": "bfloat16"}
    training = job.model.training.model_copy(update=sharing)
    model = job.model.model_copy(update={"training": training})
    memory = estimate.training_memory(
        ModelJob(job.inputs, model, job.source, job.deployed, "p", "t", job.reporter), shape, 1000
    )
    assert memory.weights == 2 * (8_000_000_000 + 800_000_000 + 819_200_000)


def test_a_base_in_4_bits_takes_them_for_its_linear_layers(job, monkeypatch):
    found = estimate.shape_of(Path(job.base_dir), "all-linear")
    assert found.linear == 2 * (3 * 64 * 128 + 2 * 64 * 64 + 2 * 64 * 32)
    shape = estimate.Shape(8_000_000_000, 4096, 32, 128_000, 100_000, 7_000_000_000)
    training = job.model.training.model_copy(update={"base_dtype": "nf4"})
    for gpus, fast, size in ((1, False, 2), (0, True, 2), (0, False, 4)):
        monkeypatch.setattr(estimate, "fast_bfloat16", lambda fast=fast: fast)
        update = {"training": training, "resources": Resources(num_gpus=gpus)}
        model = job.model.model_copy(update=update)
        memory = estimate.training_memory(dataclasses.replace(job, model=model), shape, 1000)
        # A layer's weights are made anew at a time.
        whole = 1_000_000_000 + 7_000_000_000 // 32
        assert memory.weights == pytest.approx(7e9 * 0.515869140625 + size * whole, abs=1)


def test_the_engine_that_answers_for_a_sharded_base_holds_all_its_gpus(job):
    sharing = {"workers": 8, "batch_size": 8, "shard_base": True}
    training = job.model.training.model_copy(update=sharing)
    engine = job.model.engine.model_copy(update={"tensor_parallel_size": 4})
    for gpus, held in ((0, 0), (1, 4), (8, 8)):
        resources = Resources(num_gpus=gpus)
        model = {"training": training, "engine": engine, "resources": resources}
        assert answering(job.model.model_copy(update=model)).num_gpus == held
    whole = {"engine": engine, "resources": Resources(num_gpus=1)}
    assert answering(job.model.model_copy(update=whole)).num_gpus == 1


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


def test_an_engine_may_take_no_more_of_a_gpu_than_its_worker_holds():
    shared = {"resources": {"num_gpus": 0.4}}
    enough = shared | {"engine": {"gpu_memory_utilization": 0.3}}
    served = {"models": [{"name": "a", "base": "x"}], "num_gpus": 0.4}
    for section, more in (
        (ModelConfig, {"name": "a", "base": "x"}),
        (VLLMOracle, {"kind": "vllm", "model": "x"}),
        (JudgeConfig, {"model": "x"}),
    ):
        section.model_validate(more | enough)
        with pytest.raises(ValueError, match=r"0\.85 of a GPU is more than num_gpus 0\.4 reserves"):
            section.model_validate(more | shared)
    with pytest.raises(ValueError, match=r"num_gpus 0\.4"):
        ServeConfig.model_validate(served)


def test_device_time_is_of_all_workers_and_of_gpus_where_there_are_some(job):
    shape = estimate.shape_of(Path(job.base_dir), "all-linear")
    units, tokens = {SCORES: 40, ADAPTERS: 80}, {SCORES: 100.0, ADAPTERS: 100.0}
    fleet = []
    for resources in (Resources(num_cpus=3), Resources(num_cpus=3, num_gpus=2)):
        training = job.model.training.model_copy(update={"workers": 4})
        model = job.model.model_copy(update={"resources": resources, "training": training})
        costs = estimate.stage_costs(dataclasses.replace(job, model=model), shape, units, tokens)
        score, train = costs[SCORES], costs[ADAPTERS]
        assert score.seconds is not None
        assert train.seconds is not None
        held = train.seconds * 4
        if resources.num_gpus:
            assert train.spent == estimate.Spent(gpu_hours=held * 2 / 3600)
            # Twice the pairs on four workers, at the same rate of each.
            assert train.seconds == pytest.approx(score.seconds * 2 / 4)
        else:
            assert train.spent == estimate.Spent(cpu_minutes=held * 3 / 60)
            assert score.spent == estimate.Spent(cpu_minutes=score.seconds * 3 / 60)
        fleet.append(ModelPlan("one", CHANGES, "", "", stages=[score, train]))
    plan = FleetPlan("f", "r", {}, None, fleet).to_row()
    for device in ("gpu_hours", "cpu_minutes"):
        parts = [cost["spent"][device] for row in plan["models"] for cost in row["stages"]]
        assert sum(parts) > 0
        assert plan["spent"][device] == pytest.approx(sum(parts))


def test_a_plan_holds_for_its_inputs_alone(job, tmp_path):
    found = input_digests(job.inputs)
    path = tmp_path / "plan.json"
    write_plan(path, {"config": "fleet.yaml", "digests": found})
    expected = Expected(str(path), read_plan(str(path))["digests"])
    expected.require(found)
    with pytest.raises(ConfigError, match=r"since it was planned: policy, data; plan again"):
        expected.require(found | {"policy": "x", "data": "y"})
    path.write_text("{}")
    with pytest.raises(ConfigError, match="is not a plan"):
        read_plan(str(path))


def test_a_plan_holds_for_all_that_judges_oracle_and_tasks_are_made_of(job, tmp_path):
    judge, oracle = tiny_model(tmp_path / "judge", seed=3), tiny_model(tmp_path / "oracle", seed=4)
    adapter = tiny_adapter(tmp_path / "adapter", judge, seed=5)
    label = '{"prompt": "q", "response": "foo", "verdict": "%s"}\n'
    for name in ("first.jsonl", "second.jsonl", "third.jsonl"):
        (tmp_path / name).write_text(label % "violates")
    (tmp_path / "replies.jsonl").write_text('{"prompt": "q", "response": "bar"}\n')
    (tmp_path / "heldout.jsonl").write_text('{"prompt": "What?", "bin": "invert"}\n')
    tiny_task(tmp_path / "tasks")
    fleet = yaml.safe_load((tmp_path / "fleet.yaml").read_text())
    fleet["training"]["objective"] = "trace_oracle"
    small = {"model": str(judge), "adapter": str(adapter), "labels": "first.jsonl"}
    cheap = {"kind": "rules", "labels": "second.jsonl"}
    fleet["judge"] = {"kind": "cascade", "judges": [cheap, small]}
    fleet["evaluation"] = {
        "prompts": "heldout.jsonl",
        "judge": {"kind": "rules", "labels": "third.jsonl"},
        "tasks": ["evenness"],
        "task_files": "tasks",
    }

    def now(oracle):
        path = tmp_path / "judged.yaml"
        path.write_text(yaml.safe_dump(fleet | {"oracle": oracle}))
        return digests(read_inputs(str(path)), {}, {})

    by_model = {"kind": "vllm", "model": str(oracle)}
    by_file = {"kind": "file", "path": "replies.jsonl"}
    before, filed = now(by_model), now(by_file)
    assert (now(by_model), now(by_file)) == (before, filed)
    changes = {
        "judge.judges.1.model": lambda: (judge / "chat_template.jinja").write_text(
            "{{ messages }}"
        ),
        "judge.judges.1.adapter": lambda: tiny_adapter(adapter, judge, seed=7),
        "judge.judges.0.labels": lambda: (tmp_path / "second.jsonl").write_text(label % "complies"),
        "judge.judges.1.labels": lambda: (tmp_path / "first.jsonl").write_text(label % "complies"),
        "evaluation.judge.labels": lambda: (tmp_path / "third.jsonl").write_text(
            label % "complies"
        ),
        "evaluation.tasks": lambda: (tmp_path / "tasks" / "more.txt").write_text("more"),
        "oracle.model": lambda: tiny_model(oracle, seed=8),
    }
    for name, change in changes.items():
        change()
        after = now(by_model)
        assert {key for key in after | before if after.get(key) != before.get(key)} == {name}
        before = after
    (tmp_path / "replies.jsonl").write_text('{"prompt": "q", "response": "baz"}\n')
    assert filed["oracle.path"] != now(by_file)["oracle.path"]


def test_rules_by_clause_tell_of_the_clauses_they_leave_unjudged(job, tmp_path, capsys):
    path = tmp_path / "policy.yaml"
    policy = yaml.safe_load(path.read_text())
    policy["clauses"].append({"id": "kind", "text": "Be kind.", "tier": "reduced"})
    path.write_text(yaml.safe_dump(policy))
    fleet = yaml.safe_load((tmp_path / "fleet.yaml").read_text())

    def warned(**judge):
        fleet["judge"] = {"kind": "rules"} | judge
        (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(fleet))
        inputs = read_inputs(str(tmp_path / "fleet.yaml"))
        spec, _ = earned_judge(inputs, Reporter(None, "fleet"))
        (verdict,) = ask(spec, [Exchange((Message("user", "q"),), "bar")])
        return capsys.readouterr().err, verdict

    err, verdict = warned(granularity="clause")
    assert "warning: judge.kind: rules can't judge kind, without checks in policy p 2" in err
    assert verdict.label is Label.UNJUDGED
    assert "clause kind has no checks: write some, or let a model judge it" in verdict.reason
    for judge in ({}, {"granularity": "clause", "tiers": {"reduced": 0}}):
        err, verdict = warned(**judge)
        assert (err, verdict.label) == ("", Label.COMPLIES)


def say(store, policy, label, times=1):
    """A person's word on the reply of the fleet's pair, under the policy and its one clause."""
    said = Verdict(label, float(label is Label.VIOLATES), "person:ada", provenance="human")
    key = response_id((Message("user", "q"),), "foo")
    for _ in range(times):
        store.append(HUMAN, HUMAN, policy.digest, [(policy.digest, key, said)])
        store.append(HUMAN, HUMAN, CLAUSES, [(policy.clause_key("a"), key, said)])


def test_people_s_words_count_by_what_they_say(job, tmp_path):
    fleet = yaml.safe_load((tmp_path / "fleet.yaml").read_text())
    fleet["judge"]["granularity"] = "clause"
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(fleet))
    inputs = read_inputs(str(tmp_path / "fleet.yaml"))
    store, policy = verdict_store(inputs), inputs.policy
    assert people_said(inputs) == []
    said = Verdict(Label.COMPLIES, 0.0, "person:ada", provenance="human")
    before = input_digests(inputs)
    store.append(HUMAN, HUMAN, CLAUSES, [(policy.clause_key("a"), "0" * 16, said)])
    after = input_digests(inputs)
    assert {name for name in after if after[name] != before[name]} == {"people's verdicts"}
    say(store, policy, Label.VIOLATES, 20)
    found = people_said(inputs)
    say(store, policy, Label.VIOLATES)  # the same file brought in again
    store.append(HUMAN, HUMAN, CLAUSES, [("of another policy", "0" * 16, said)])
    assert people_said(inputs) == found
    store.gc({}, 0)  # merges files
    assert people_said(inputs) == found
    say(store, policy, Label.COMPLIES)
    assert people_said(inputs) != found


def test_a_model_that_was_promoted_is_realigned_once_people_said_more(job, tmp_path):
    inputs, deployed = job.inputs, job.deployed
    keep_result(inputs, "one", {"adapter_sha256": deployed.sha256})
    kept = kept_results(inputs, whole=False)["one"]
    assert is_live(inputs, kept, deployed)
    assert not is_live(inputs, kept, dataclasses.replace(deployed, sha256="ee"))
    say(verdict_store(inputs), inputs.policy, Label.COMPLIES)
    assert read_inputs(str(tmp_path / "fleet.yaml")).run_id == inputs.run_id
    assert not is_live(inputs, kept, deployed)


def test_a_file_of_the_same_size_and_time_is_another(tmp_path):
    file = tmp_path / "adapter.safetensors"
    found = []
    for text in ("one", "two"):
        file.write_text(text)
        os.utime(file, (1, 1))  # as reproducible archives set it
        found.append(remembered_digest([file], tmp_path / "cache"))
    assert len({*found, remembered_digest([file], tmp_path / "cache")}) == 2


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
