"""One model's measurement in one process."""

from dataclasses import replace

import pytest

from trace_ray.config import EngineConfig
from trace_ray.errors import ModelError
from trace_ray.models.lm_tasks import TaskSuite
from trace_ray.runtime.measure import MeasureJob, measure
from trace_ray.runtime.parts import Parts
from trace_ray.testing import tiny_adapter, tiny_model, tiny_task
from trace_ray.types import Message


def test_a_measurement_goes_on_where_it_was_broken_off(tmp_path):
    base = tiny_model(tmp_path / "base", "llama", seed=1)
    tiny_task(tmp_path / "tasks")
    prompts = [(Message("user", f"What is {n}?"),) for n in range(8)]
    job = MeasureJob(
        base=str(base),
        before=None,
        after=str(tiny_adapter(tmp_path / "adapter", base, seed=2)),
        asked=[prompts[0], prompts[1], prompts[0]],
        retention=prompts[2:],
        blimp_pairs=0,
        tasks=TaskSuite(("evenness",), str(tmp_path / "tasks"), limit=4),
        max_new_tokens=24,
        engine=EngineConfig(dtype="float32", max_model_len=128),
        num_threads=1,
        parts=Parts(str(tmp_path / "parts")),
    )

    def interrupt(what):
        if what == "retention":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(job, interrupt)
    # An engine that can't start: what it said is known.
    broken = replace(job, engine=EngineConfig(dtype="float32", max_model_len=2**30))
    found = measure(broken, lambda _: None)
    assert found.replies["before"][0] == found.replies["before"][2]
    assert [len(found.replies[side]) for side in ("before", "after")] == [3, 3]
    assert [len(found.tasks["evenness"][side]) for side in ("before", "after")] == [4, 4]
    assert found.kl > 0
    with pytest.raises(ModelError, match="max_model_len"):
        measure(replace(broken, parts=Parts()), lambda _: None)
