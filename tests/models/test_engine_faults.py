"""What a judge's engine can't answer or doesn't survive: one row's trouble, never the batch's."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from trace_ray.config import EngineConfig, JudgeConfig
from trace_ray.core.policy import parse_policy
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
    unknown = max(judge._encoded(bad))
    assert f"vLLM refuses a prompt: Token id {unknown} is out of" in verdicts[1].reason
    assert verdicts[0] == verdicts[2] == judge.verdicts([good])[0]


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
