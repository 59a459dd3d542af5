"""What a judge's engine can't answer or doesn't survive: one row's trouble, never the batch's."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from trace_ray.config import EngineConfig, JudgeConfig
from trace_ray.core.policy import parse_policy
from trace_ray.core.verdicts import mean_odds
from trace_ray.data.steering import smoothed
from trace_ray.models import engine as engine_module
from trace_ray.runtime.judges import Exchange, JudgeSpec, VLLMJudge
from trace_ray.testing import tiny_model
from trace_ray.types import Label, Message

ASK = (Message("user", "q"),)
POLICY = parse_policy(
    {"id": "p", "version": "1", "clauses": [{"id": "kind", "text": "Be kind."}]}, "p.yaml"
)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A judge whose engine is a process of its own, as it is on a GPU."""
    folder = tiny_model(tmp_path_factory.mktemp("judge"))
    engine = EngineConfig(dtype="float32", max_model_len=1024)
    config = JudgeConfig(kind="vllm", model=str(folder), engine=engine)
    environment = engine_module.engine_env

    def apart(*args):
        return environment(*args) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}

    before = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "engine_env", apart)
        made = VLLMJudge(JudgeSpec(config, POLICY, "tiny", "digest", model_dir=str(folder)))
        yield made
        made.engine.close()
    os.environ.clear()
    os.environ.update(before)


def test_a_row_that_the_engine_refuses_is_unjudged_alone(judge):
    # Tokens that the engine's own copy of the tokenizer doesn't have, and the model neither.
    judge.tokenizer.add_tokens([f"zyxw{i}" for i in range(100, 200)])
    good, bad = (Exchange(ASK, text) for text in ("fine", "a zyxw199 b"))
    verdicts = judge.verdicts([good, bad, good])
    assert [verdict.label is Label.UNJUDGED for verdict in verdicts] == [False, True, False]
    (ids,) = judge._encoded(bad)
    unknown = max(ids)
    assert f"vLLM refuses a prompt: Token id {unknown} is out of" in verdicts[1].reason
    assert verdicts[0] == verdicts[2] == judge.verdicts([good])[0]


def test_a_smoothed_verdict_is_at_the_mean_log_odds_of_the_copies(judge, monkeypatch):
    good, long = Exchange(ASK, "fine"), Exchange(ASK, "far " * 2000)
    copies = [judge.verdicts([Exchange(ASK, text)])[0] for text in smoothed("fine", 3)]
    assert len({copy.p_violate for copy in copies}) == 4
    config = judge.spec.config.model_copy(update={"smoothing": 3})
    monkeypatch.setattr(judge, "spec", replace(judge.spec, config=config))
    verdicts = judge.verdicts([good, long, good])
    expected = mean_odds([copy.p_violate for copy in copies])
    assert verdicts[0].p_violate == pytest.approx(expected, rel=1e-9)
    assert verdicts[0] == verdicts[2]
    assert "longer than" in verdicts[1].reason


def test_an_engine_that_is_killed_over_a_question_is_started_again(judge):
    good = Exchange(ASK, "fine")
    (before,) = judge.verdicts([good])
    core = judge.engine._llm.llm_engine.engine_core
    (process,) = core.resources.engine_manager.processes
    os.kill(process.pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(judge.verdicts, [good])
        time.sleep(1)
        assert not asked.done()
        os.kill(process.pid, signal.SIGKILL)
        assert asked.result() == [before]
