"""Capability on tasks of lm-evaluation-harness: items in pairs, and tasks that can't be compared."""

from contextlib import nullcontext

import pytest
import torch

from trace_ray.config import EngineConfig
from trace_ray.errors import DataError
from trace_ray.models.engine import AdapterPath, Engine
from trace_ray.models.families import load_tokenizer
from trace_ray.models.lm_tasks import TaskSuite
from trace_ray.models.policy_model import load_measured_model
from trace_ray.testing import tiny_adapter, tiny_model, tiny_task

LENGTHY = {"task": "lengthy", "doc_to_text": "again " * 80 + "{{question}}"}
LETTERS = {"task": "letters", "doc_to_choice": '{{[question[3], "e"]}}'}
COPIED = {
    "task": "copied",
    "output_type": "generate_until",
    "doc_to_target": "{{choices[label]}}",
    "doc_to_choice": None,
    "generation_kwargs": {"max_new_tokens": 4, "until": ["\n"]},
    "metric_list": [{"metric": "exact_match"}],
}
PERPLEXITY = {
    "task": "perplexing",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "doc_to_choice": None,
    "metric_list": [{"metric": "word_perplexity"}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("tasks")
    room = {"generation_kwargs": {"max_new_tokens": 120, "until": ["\n"]}}
    lengthy_copied = COPIED | {"task": "lengthy_copied"} | room
    for more in ({}, LETTERS, COPIED, PERPLEXITY, LENGTHY, lengthy_copied):
        tiny_task(at, **more)
    missing = {"test": str(at / "gone.jsonl")}
    tiny_task(at, task="gone", dataset_kwargs={"data_files": missing})
    return at


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The directories of a base and of an adapter, and both loaded."""
    at = tmp_path_factory.mktemp("models")
    base = tiny_model(at / "base", "llama", seed=1)
    adapter = tiny_adapter(at / "adapter", base, seed=2)
    return str(base), str(adapter), load_measured_model(base, None, str(adapter))


@pytest.fixture(scope="module")
def engine(model):
    started = Engine(model[0], EngineConfig(dtype="float32", max_model_len=128), lora=True)
    yield started
    started.close()


def _logp(model, tokenizer, start, end):
    """log p(end | start) by a plain forward pass."""
    prompt = tokenizer.encode(start)
    ids = prompt + tokenizer.encode(end, add_special_tokens=False)
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return sum(logps[at - 1, ids[at]].item() for at in range(len(prompt), len(ids)))


def test_each_adapter_has_every_item_in_order(folder, model, engine):
    """Expected: whether the right one of two answers is the likelier, on models on which it differs."""
    base, adapter, peft = model
    tokenizer = load_tokenizer(base)
    suite = TaskSuite(("letters", "copied"), str(folder), limit=10)
    suite.check()
    found = [suite.outcomes(engine, each) for each in (None, AdapterPath("after", adapter))]
    assert found[0]["letters"] != found[1]["letters"]
    for items, plain in zip(found, (peft.disable_adapter(), nullcontext()), strict=True):
        assert [len(items[task]) for task in ("letters", "copied")] == [10, 10]
        expected = []
        with plain:
            for i in range(10):
                start = f"Q: Is {i} even?\nA:"
                zero, one = (_logp(peft, tokenizer, start, f" {end}") for end in (i, "e"))
                expected.append(float((one > zero) == i % 2))
        assert items["letters"] == expected


def test_what_no_gate_can_compare_is_refused(folder, engine):
    with pytest.raises(DataError, match=r"perplexing: its metric word_perplexity is no number"):
        TaskSuite(("perplexing",), str(folder)).outcomes(engine, None)
    with pytest.raises(DataError, match=r"evaluation\.tasks: gone: FileNotFoundError"):
        TaskSuite(("gone",), str(folder)).outcomes(engine, None)
    with pytest.raises(DataError, match=r"has no task elsewhere nor a file in"):
        TaskSuite(("evenness", "elsewhere"), str(folder)).check()


@pytest.mark.parametrize("task", ["lengthy", "lengthy_copied"])
def test_no_item_is_cut_where_the_model_has_room(folder, engine, task):
    with pytest.raises(
        DataError, match=r"takes \d+ tokens .* the engine 128: raise .*max_model_len"
    ):
        TaskSuite((task,), str(folder), limit=2).outcomes(engine, None)


def test_the_digest_is_of_what_is_measured(tmp_path, tmp_path_factory):
    tiny_task(tmp_path)
    suite = TaskSuite(("evenness",), str(tmp_path))
    cache = tmp_path_factory.mktemp("cache")
    before = suite.digest(cache)
    assert before == TaskSuite(("evenness",), str(tmp_path)).digest(cache)
    assert before != TaskSuite(("evenness",), str(tmp_path), limit=3).digest(cache)
    tiny_task(tmp_path, items=13)
    assert before != suite.digest(cache)
    assert not TaskSuite()
