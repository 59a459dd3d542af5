"""All models at once: in which order, and how many."""

import dataclasses
import time

import pytest
import ray
import yaml

from trace_ray.models.references import ModelSource
from trace_ray.rollout.parallel import find_models, side_by_side
from trace_ray.rollout.plan import read_inputs
from trace_ray.testing import tiny_model


def jobs(*sizes):
    @dataclasses.dataclass(frozen=True)
    class Job:  # in here, so that it travels to a worker by value
        source: ModelSource

    return [Job(ModelSource("m", "/m", "", "d", "llama", size)) for size in sizes]


def meeting(folder, n):
    """Return a task that waits until ``n`` have begun, and says how many are running where it begins."""

    def begin(job):
        name = f"{job.source.weight_bytes}"
        (folder / f"{name}.began").touch()
        running = len(list(folder.glob("*.began"))) - len(list(folder.glob("*.ended")))
        limit = time.monotonic() + 360
        while len(list(folder.glob("*.began"))) < n:
            if time.monotonic() > limit:
                raise TimeoutError(f"{name} waits for others")
            time.sleep(0.05)
        (folder / f"{name}.ended").touch()
        return running

    return ray.remote(num_cpus=0)(begin)


def test_the_largest_model_is_first(cluster, tmp_path):
    ended = side_by_side(meeting(tmp_path, 1), jobs(2, 5, 1, 4, 3), 1)
    found = [(job.source.weight_bytes, ray.get(reference)) for job, reference in ended]
    assert found == [(size, 1) for size in (5, 4, 3, 2, 1)]


@pytest.mark.parametrize(("parallel", "at_once"), [(2, 2), (None, 4)])
def test_so_many_run_at_once_and_no_more(cluster, tmp_path, parallel, at_once):
    ended = list(side_by_side(meeting(tmp_path, at_once), jobs(1, 2, 3, 4), parallel))
    began = sorted(tmp_path.glob("*.began"), key=lambda path: path.stat().st_mtime_ns)
    assert {int(path.stem) for path in began[:at_once]} == set(range(5 - at_once, 5))
    running = [ray.get(reference) for _, reference in ended]
    assert max(running) <= at_once
    assert len(ended) == 4


def test_a_model_with_too_few_positions_fails_alone(cluster, tmp_path):
    base = str(tiny_model(tmp_path / "base"))
    clause = {"id": "a", "text": "Never say foo.", "checks": {"must_not_match": "foo"}}
    policy = {"id": "p", "version": "1", "clauses": [clause]}
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(policy))
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "q", "chosen": "foo", "rejected": "bar"}')
    (tmp_path / "heldout.jsonl").write_text('{"prompt": "What?", "bin": "invert"}')
    settings = {
        "fits": {"training": {"max_length": 1024}},
        "trains": {"training": {"max_length": 1025}},
        "answers": {"engine": {"max_model_len": 2048}},
    }
    config = {
        "policy": "policy.yaml",
        "data": {"source": "pairs.jsonl"},
        "judge": {"kind": "rules"},
        "models": [{"name": name, "base": base} | more for name, more in settings.items()],
        "evaluation": {"prompts": "heldout.jsonl"},
        "storage": str(tmp_path / "storage"),
    }
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(config))
    inputs = read_inputs(str(tmp_path / "fleet.yaml"))
    sources, _, failed = find_models(inputs, inputs.config.models)
    assert sources.keys() == {"fits"}
    has = (
        f"tokens are more than {base} has positions for: 1024 by its config.json; set 1024 or less"
    )
    assert failed == {
        "trains": f"models.trains.training.max_length: 1025 {has}",
        "answers": f"models.answers.engine.max_model_len: 2048 {has}",
    }
    # What is only measured need not be trained.
    assert find_models(inputs, inputs.config.models, trained=False)[2].keys() == {"answers"}
