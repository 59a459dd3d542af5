"""Capability on tasks of lm-evaluation-harness: items in pairs, and tasks that can't be compared."""

import pytest

from trace_ray.errors import DataError
from trace_ray.models.families import load_tokenizer
from trace_ray.models.lm_tasks import TaskSuite
from trace_ray.models.policy_model import load_measured_model
from trace_ray.testing import tiny_adapter, tiny_model, tiny_task

COPIED = {
    "task": "copied",
    "output_type": "generate_until",
    "doc_to_target": "{{choices[label]}}",
    "doc_to_choice": None,
    "generation_kwargs": {"max_gen_toks": 4, "until": ["\n"]},
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
    for more in ({}, COPIED, PERPLEXITY):
        tiny_task(at, **more)
    missing = {"test": str(at / "gone.jsonl")}
    tiny_task(at, task="gone", dataset_kwargs={"data_files": missing})
    return at


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    at = tmp_path_factory.mktemp("models")
    base = tiny_model(at / "base", "llama", seed=1)
    adapter = tiny_adapter(at / "adapter", base, seed=2)
    return load_measured_model(base, None, str(adapter)), load_tokenizer(base)


def test_each_side_has_every_item_in_order(folder, model):
    """Expected: the likelier of two answers, from the model's own log-probabilities."""
    import torch

    peft, tokenizer = model
    suite = TaskSuite(("evenness", "copied"), str(folder), limit=10)
    suite.check()
    for trained in (False, True):
        found = suite.outcomes(peft, tokenizer, trained=trained)
        assert [len(found[task]) for task in ("evenness", "copied")] == [10, 10]
        expected = []
        for i in range(10):
            scores = []
            for choice in (" yes", " no"):
                start = tokenizer.encode(f"Q: Is {i} even?\nA:")
                ids = start + tokenizer.encode(choice, add_special_tokens=False)
                with torch.no_grad():
                    run = peft if trained else peft.get_base_model()
                    if trained:
                        logits = run(torch.tensor([ids])).logits
                    else:
                        with peft.disable_adapter():
                            logits = peft(torch.tensor([ids])).logits
                logps = logits[0].float().log_softmax(-1)
                scores.append(sum(logps[t - 1, ids[t]].item() for t in range(len(start), len(ids))))
            expected.append(float((scores[1] > scores[0]) == i % 2))
        assert found["evenness"] == expected


def test_what_no_gate_can_compare_is_refused(folder, model):
    with pytest.raises(DataError, match=r"perplexing: its metric word_perplexity is no number"):
        TaskSuite(("perplexing",), str(folder)).outcomes(*model, trained=True)
    with pytest.raises(DataError, match=r"evaluation\.tasks: gone: FileNotFoundError"):
        TaskSuite(("gone",), str(folder)).outcomes(*model, trained=True)
    with pytest.raises(DataError, match=r"has no task elsewhere nor a file in"):
        TaskSuite(("evenness", "elsewhere"), str(folder)).check()


def test_the_digest_is_of_what_is_measured(tmp_path):
    tiny_task(tmp_path)
    suite = TaskSuite(("evenness",), str(tmp_path))
    before = suite.digest()
    assert before == TaskSuite(("evenness",), str(tmp_path)).digest()
    assert before != TaskSuite(("evenness",), str(tmp_path), limit=3).digest()
    tiny_task(tmp_path, items=13)
    assert before != suite.digest()
    assert not TaskSuite()
