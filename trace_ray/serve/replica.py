"""One Ray Serve replica: a vLLM engine with its own OpenAI handlers, adapters as requests.

Every import from vLLM's server side, which is not a stable interface, stands here and in ``protocol``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.util.metrics import Counter

from trace_ray.config import EngineConfig
from trace_ray.core.fingerprint import not_in_effect
from trace_ray.errors import ModelError, ServeError
from trace_ray.models.adapters import adapter_sha256
from trace_ray.models.device import has_gpu
from trace_ray.models.engine import engine_kwargs
from trace_ray.models.fingerprint import read_fingerprint
from trace_ray.runtime.worker_start import lean_imports
from trace_ray.serve import protocol
from trace_ray.serve.storage import ServedBucket
from trace_ray.types import Prompt, prompt_from_rows

BASE_NAME = "base"
"""Name of the base model inside its engine."""
PLUGIN = "trace_ray_cpu_lora"
MAX_TOKEN_CHARS = 16
"""Characters that tokens have on average at most: more text need not be tokenized, which would hold up
the engine, to tell that it is too long."""
_log = logging.getLogger("ray.serve")


def check_digest(adapter_id: str, path: str, sha256: str) -> None:
    """Refuse an adapter whose weights are not the ones that were named.

    Raises:
        ServeError: the file is missing or has another digest.
    """
    try:
        found = adapter_sha256(Path(path))
    except ModelError as error:
        raise ServeError(f"adapter {adapter_id}: {error}") from None
    if found != sha256:
        raise ServeError(
            f"adapter {adapter_id}: {path} has digest {found[:12]}..., expected {sha256[:12]}...; "
            "the adapter is refused"
        )


def _allow_plugin() -> None:
    """Make sure the engine's own process will load the CPU LoRA repair.

    Raises:
        ServeError: the package's entry points are not installed.
    """
    from importlib.metadata import entry_points

    if has_gpu():
        return
    if PLUGIN not in entry_points(group="vllm.general_plugins").names:
        raise ServeError("trace-ray must be installed (pip install -e .) to serve on the CPU")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        os.environ["VLLM_PLUGINS"] = ",".join([*filter(None, [allowed]), PLUGIN])


class EngineReplica:
    """An engine for one base model and all adapters on it."""

    def __init__(
        self,
        base: str,
        chat_template: str | None,
        engine: dict[str, Any],
        bucket: dict[str, Any] | None = None,
    ) -> None:
        """Remember what to start; the engine starts in ``reconfigure``, before any request.

        Args:
            base: directory of the base model.
            chat_template: Jinja text or file; None = the tokenizer's own.
            engine: an ``EngineConfig`` as JSON.
            bucket: a ``ServedBucket`` as JSON; None = this node sees all folders.
        """
        self._bucket = None if bucket is None else ServedBucket.model_validate(bucket)
        self._base = base
        self._chat_template = chat_template
        self._config = EngineConfig.model_validate(engine)
        self._lock = asyncio.Lock()
        self._digests: dict[str, str] = {}
        """Id -> sha256 of what was loaded: a name never gets other weights in this engine."""
        self._in_service: set[str] = set()
        """Ids that were proved: while its proof runs, an adapter answers nobody."""
        self._unproved: set[str] = set()
        """Ids in service whose effect nothing recorded."""
        self._require_fingerprint = False
        self._engine: Any = None
        self._state: Any = None
        self._tokenizer: Any = None
        self._verdict_ids: tuple[int, int] | None = None
        self._loads = Counter(
            "trace_ray_adapter_loads", "Adapters loaded and forgotten", tag_keys=("adapter", "act")
        )

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Load the adapters named in ``user_config`` and forget all others, without a restart.

        Raises:
            ServeError: an adapter's digest is wrong, or vLLM can't load it.
        """
        adapters = user_config["adapters"]
        self._require_fingerprint = user_config["require_fingerprint"]
        for adapter in adapters:
            await asyncio.to_thread(self._check, adapter)
        async with self._lock:
            if self._engine is None:
                await self._start()
            await self._load(adapters)

    async def load(self, adapter: Mapping[str, Any]) -> None:
        """Load one more adapter, where it is not loaded; those there stay.

        Raises:
            ServeError: its digest is wrong, its name is another's, or vLLM can't load it.
        """
        if self._is_loaded(adapter):
            return
        await asyncio.to_thread(self._check, adapter)
        async with self._lock:
            await self._add(adapter)

    def _check(self, adapter: Mapping[str, str]) -> None:
        """Have an adapter on this node, with the weights that were named."""
        if self._bucket is not None:
            self._bucket.store.here(adapter["path"])
        check_digest(adapter["id"], adapter["path"], adapter["sha256"])

    def _is_loaded(self, adapter: Mapping[str, str]) -> bool:
        known = self._digests.get(adapter["id"], adapter["sha256"])
        if known != adapter["sha256"]:
            raise ServeError(
                f"adapter {adapter['id']}: is loaded with digest {known[:12]}..., not "
                f"{adapter['sha256'][:12]}...: new weights need a new id"
            )
        return adapter["id"] in self._in_service

    async def _start(self) -> None:
        _allow_plugin()
        if self._bucket is not None:
            await asyncio.to_thread(self._bucket.fetch_base, self._base)
        lean_imports()
        from starlette.datastructures import State
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments: Any = make_arg_parser(FlexibleArgumentParser()).parse_args([])
        arguments.model = self._base
        arguments.served_model_name = [BASE_NAME]
        arguments.chat_template = self._chat_template
        kwargs = engine_kwargs(self._config, self._base, lora=True)
        self._engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**kwargs, served_model_name=[BASE_NAME], disable_log_stats=True)
        )
        self._state = State()
        await init_app_state(self._engine, self._state, arguments, supported_tasks=("generate",))

    async def _load(self, adapters: list[Mapping[str, Any]]) -> None:
        wanted = {adapter["id"]: adapter for adapter in adapters}
        for adapter in wanted.values():
            await self._add(adapter)
        for adapter_id in self._in_service - set(wanted):
            await self._forget(adapter_id, "forget")

    async def _add(self, adapter: Mapping[str, Any]) -> None:
        """Load an adapter that was checked; the lock is held."""
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        if self._is_loaded(adapter):
            return
        request = LoadLoRAAdapterRequest(lora_name=adapter["id"], lora_path=adapter["path"])
        answer = await self._state.openai_serving_models.load_lora_adapter(request)
        if isinstance(answer, ErrorResponse):
            raise ServeError(f"adapter {adapter['id']}: {answer.error.message}")
        # Also of one that is refused: what its proof leaves in the prefix cache is under its name.
        self._digests[adapter["id"]] = adapter["sha256"]
        try:
            await self._prove(adapter)
        except BaseException as error:  # cancelled, or the engine failed: it is not proved either
            await self._forget(adapter["id"], "refuse")
            if not isinstance(error, ModelError | ServeError | ValueError):
                raise
            raise ServeError(f"adapter {adapter['id']}: {error}; the adapter is refused") from None
        self._in_service.add(adapter["id"])
        self._loads.inc(tags={"adapter": adapter["id"], "act": "load"})

    async def _prove(self, adapter: Mapping[str, Any]) -> None:
        """Compare what the adapter changes in this engine with what was recorded of it, if it was.

        Raises:
            ModelError: the record can't be read.
            ServeError: the change is another, or there is no record and there has to be one.
        """
        probes = await asyncio.to_thread(read_fingerprint, adapter["path"])
        if not probes:
            if not adapter.get("judge"):  # judges have none: they are measured on labels
                self._note_unproved(adapter["id"])
            return
        lora = self._state.openai_serving_models.lora_requests[adapter["id"]]
        # Together, so that one batch mixes base and adapter, as traffic does.
        values = await asyncio.gather(
            *(
                self._next_logps(p.prompt_ids, p.token_ids, each)
                for each in (None, lora)
                for p in probes
            )
        )
        base, changed = values[: len(probes)], values[len(probes) :]
        if why := not_in_effect(probes, base, changed):
            raise ServeError(why)

    def _note_unproved(self, adapter_id: str) -> None:
        if self._require_fingerprint:
            raise ServeError("has no fingerprint.json, which serve.require_fingerprint asks for")
        _log.warning("adapter %s has no fingerprint.json: its effect is not proved", adapter_id)
        self._unproved.add(adapter_id)
        self._loads.inc(tags={"adapter": adapter_id, "act": "unproved"})

    def unproved(self) -> list[str]:
        """Return the ids in service whose effect nothing recorded."""
        return sorted(self._unproved)

    def schemas(self, ref_template: str) -> dict[str, dict[str, Any]]:
        """Return ``protocol.schemas``, which need vLLM, as engines have it."""
        return protocol.schemas(ref_template)

    async def _forget(self, adapter_id: str, act: str) -> None:
        from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest

        self._in_service.discard(adapter_id)
        self._unproved.discard(adapter_id)
        models = self._state.openai_serving_models
        await models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=adapter_id))
        self._loads.inc(tags={"adapter": adapter_id, "act": act})

    async def check_health(self) -> None:
        """Raise when the engine is dead, so that Serve replaces this replica."""
        if self._engine is not None:
            await self._engine.check_health()

    async def ping(self) -> int:
        """Return this replica's process id; 0 while the engine starts."""
        await self.check_health()
        return 0 if self._engine is None else os.getpid()

    async def complete(
        self, kind: str, body: dict[str, Any], name: str, adapter: dict[str, str] | None
    ) -> AsyncIterator[Any]:
        """Answer one OpenAI request.

        Args:
            kind: ``chat`` or ``completion``.
            body: The request's JSON.
            name: The model name that was asked for; echoed.
            adapter: ``{id, path, sha256}`` of the adapter that answers; None is the base model. It
                is loaded first where a replica doesn't have it (yet, or since a restart).

        Yields:
            First ``(status, streaming)``, then the body's text in parts.
        """
        answerer = BASE_NAME if adapter is None else adapter["id"]
        try:
            if adapter is not None:
                await self.load(adapter)
            answer = await self._handle(kind, body | {"model": answerer})
        except Exception as error:
            answer = protocol.error_of(error)
        mark = {"model": name, "system_fingerprint": answerer}
        if hasattr(answer, "error"):
            yield answer.error.code, False
            yield answer.model_dump_json()
        elif hasattr(answer, "model_dump"):
            yield 200, False
            yield json.dumps(answer.model_dump(mode="json") | mark)
        else:
            yield 200, True
            async for event in answer:
                yield protocol.marked(event, mark)

    async def _handle(self, kind: str, body: dict[str, Any]) -> Any:
        request = protocol.request_of(kind, body)
        if kind == "chat":
            return await self._state.openai_serving_chat.create_chat_completion(request)
        return await self._state.openai_serving_completion.create_completion(request)

    async def judge(
        self, adapter_id: str | None, questions: list[list[dict[str, str]]]
    ) -> list[float | str]:
        """Return the probability of ``Yes`` against ``No`` after each question.

        Args:
            adapter_id: The judge's adapter; None is the base model.
            questions: Conversations, as message rows; those of one policy share a cached prefix.

        Returns:
            p in [0, 1] per question, or why there is none.
        """
        prompts = [prompt_from_rows(question) for question in questions]
        return list(await asyncio.gather(*(self._asked(adapter_id, p) for p in prompts)))

    async def _asked(self, adapter_id: str | None, prompt: Prompt) -> float | str:
        from trace_ray.models.chat import encode_prompt

        most = self._config.max_model_len
        too_long = f"longer than the judge's {most} tokens"
        if sum(len(message.content) for message in prompt) > MAX_TOKEN_CHARS * most:
            return too_long
        try:
            yes, no = self._yes_no()
            ids = encode_prompt(self._tokenizer, prompt, shared_system=True)
        except ModelError as error:
            return str(error)
        if not 0 < len(ids) < most:
            return too_long
        adapters = self._state.openai_serving_models.lora_requests
        lora = None if adapter_id is None else adapters[adapter_id]
        says_yes, says_no = await self._next_logps(ids, [yes, no], lora)
        p = 1 / (1 + math.exp(min(says_no - says_yes, 700.0)))
        return "the judge gave no probability" if math.isnan(p) else p

    async def _next_logps(
        self, prompt_ids: Sequence[int], token_ids: Sequence[int], lora: Any
    ) -> list[float]:
        """Return log p(token | prompt) of each token, nats, under a LoRA request or the base."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=1, logprob_token_ids=list(token_ids), detokenize=False
        )
        prompt: Any = {"prompt_token_ids": list(prompt_ids)}
        name = f"logps-{uuid.uuid4().hex}"
        output: Any = None
        async for answer in self._engine.generate(prompt, params, name, lora_request=lora):
            output = answer
        logprobs = output.outputs[0].logprobs[0]
        return [logprobs[token].logprob for token in token_ids]

    def _yes_no(self) -> tuple[int, int]:
        if self._verdict_ids is None:
            from trace_ray.core.judge_prompt import NO, YES
            from trace_ray.models.families import load_tokenizer
            from trace_ray.models.judge_adapter import verdict_token

            self._tokenizer = load_tokenizer(self._base)
            yes, no = (verdict_token(self._tokenizer, word) for word in (YES, NO))
            self._verdict_ids = yes, no
        return self._verdict_ids

    def __del__(self) -> None:
        """Stop the engine's process with the replica."""
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.shutdown()
