"""Corrected responses for PUNISH pairs: written by an oracle, accepted only by the judge's word."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trace_ray.config.oracle import FileOracle, OpenAIOracle, OracleConfig, VLLMOracle
from trace_ray.core.oracle_prompt import oracle_prompt
from trace_ray.core.policy import Policy
from trace_ray.core.triage import corrected
from trace_ray.core.verdicts import UNREACHED, unreached
from trace_ray.errors import ConfigError, DataError
from trace_ray.runtime.judges import Exchange
from trace_ray.runtime.openai_judge import BUSY, storable
from trace_ray.types import Label, Prompt, TriagedPair, Verdict

_PASSING = (401, 404, *BUSY)
"""What an endpoint answers below 500 whatever the prompt is."""

Replies = list[list[str] | str]
"""Per prompt the candidate replies, best first; or why an endpoint gave none.

A reason that begins with ``UNREACHED`` may pass: the next run asks for those replies again.
"""


def is_written(reply: list[str] | str) -> bool:
    """Return whether a prompt is done with: it has its candidates, or is refused for what it says."""
    return not (isinstance(reply, str) and reply.startswith(UNREACHED))


def correct(
    rows: Sequence[TriagedPair],
    replies: Replies,
    verdicts_of: Callable[[list[Exchange]], list[Verdict]],
) -> tuple[dict[str, TriagedPair], set[str]]:
    """Put the first candidate that the judge accepts into each PUNISH row.

    Args:
        rows: PUNISH rows.
        replies: what the oracle wrote for each.
        verdicts_of: the judge: exchanges to verdicts, called once.

    Returns:
        The corrected rows, by the ids they had; the others stay PUNISH (NPO). And the ids of those of
        the others that the judge was down at.
    """
    asked = [
        (row, text)
        for row, texts in zip(rows, replies, strict=True)
        if not isinstance(texts, str)
        for text in dict.fromkeys(text.strip() for text in texts)
        if text and text != row.pair.chosen
    ]
    questions = [Exchange(row.pair.prompt, text) for row, text in asked]
    verdicts = verdicts_of(questions) if asked else []
    accepted: dict[str, TriagedPair] = {}
    down = set[str]()
    for (row, text), verdict in zip(asked, verdicts, strict=True):
        if verdict.label is Label.COMPLIES and row.pair_id not in accepted:
            accepted[row.pair_id] = corrected(row, text, verdict)
        elif unreached(verdict):
            down.add(row.pair_id)
    return accepted, down - accepted.keys()


def write_replies(
    config: OracleConfig,
    policy: Policy,
    prompts: Sequence[Prompt],
    models: Path,
    n_known: int = 0,
) -> Replies:
    """Return candidate replies to each prompt, or why an endpoint gave none.

    Args:
        config: who writes them.
        policy: the new policy, which a generator reads.
        prompts: prompts of the PUNISH pairs.
        models: cache of base models.
        n_known: how many other pairs have their replies from an earlier run.

    Raises:
        ConfigError: OpenAI itself is asked and its key is not set.
        DataError: a malformed file, or an endpoint that fails at every prompt and no reply is known.
        ModelError: the generator can't be loaded.
    """
    if isinstance(config, FileOracle):
        from trace_ray.data.sources import read_replies

        known = read_replies(config.path)
        return [known.get(prompt, []) for prompt in prompts]
    asked = [oracle_prompt(policy, prompt) for prompt in prompts]
    if isinstance(config, VLLMOracle):
        return _from_engine(config, asked, models)
    return _from_endpoint(config, asked, n_known)


def _from_engine(config: VLLMOracle, asked: Sequence[Prompt], models: Path) -> Replies:
    from trace_ray.models.chat import encode_prompt, stop_token_ids
    from trace_ray.models.engine import AdapterPath, Engine
    from trace_ray.models.families import load_tokenizer
    from trace_ray.models.references import resolve_model

    base = str(resolve_model(config.model, config.revision, models).path)
    tokenizer = load_tokenizer(base)
    adapter = AdapterPath("oracle", config.adapter) if config.adapter else None
    engine = Engine(
        base, config.engine, lora=adapter is not None, num_cpus=config.resources.n_threads
    )
    ids = [encode_prompt(tokenizer, prompt) for prompt in asked]
    fits = [i for i, tokens in enumerate(ids) if len(tokens) < config.engine.max_model_len]
    replies: Replies = [[] for _ in ids]
    answers = engine.sample(
        [ids[i] for i in fits],
        config.attempts,
        config.temperature,
        config.max_new_tokens,
        stop_token_ids(tokenizer),
        adapter,
    )
    engine.close()
    for i, texts in zip(fits, answers, strict=True):
        replies[i] = texts
    return replies


def _from_endpoint(config: OpenAIOracle, asked: Sequence[Prompt], n_known: int) -> Replies:
    from openai import APIStatusError, OpenAI, OpenAIError

    key = os.environ.get(config.api_key_env)
    if key is None and config.base_url is None and "OPENAI_BASE_URL" not in os.environ:
        raise ConfigError(f"oracle: set {config.api_key_env}, or name a server in oracle.base_url")
    client = OpenAI(api_key=key or "none", base_url=config.base_url, max_retries=5)

    def ask(prompt: Prompt) -> list[str] | str:
        """Return the replies, or why there are none."""
        try:
            answer = client.chat.completions.create(
                model=config.model,
                messages=[turn.to_row() for turn in prompt],  # pyright: ignore[reportArgumentType]
                n=config.attempts,
                temperature=config.temperature,
                max_tokens=config.max_new_tokens,
            )
            return [storable(choice.message.content or "") for choice in answer.choices]
        except APIStatusError as error:
            why, status = f"the endpoint answers {error.status_code}", error.status_code
            return f"{UNREACHED}: {why}" if status >= 500 or status in _PASSING else why
        except (OpenAIError, ValueError, AttributeError, TypeError) as error:
            # Unreachable, or a body that is not JSON or has another shape.
            return storable(f"{UNREACHED}: {type(error).__name__}: {error}")

    with ThreadPoolExecutor(config.concurrency) as pool:
        answers = list(pool.map(ask, asked))
    failed = dict.fromkeys(answer for answer in answers if isinstance(answer, str))
    if asked and not n_known and all(isinstance(answer, str) for answer in answers):
        raise DataError(
            f"oracle: {client.base_url}: no answer to any of {len(asked)} prompts: {'; '.join(failed)}"
        )
    return answers
