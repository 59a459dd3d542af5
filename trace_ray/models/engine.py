"""One vLLM engine inside this process: one-token verdicts and greedy answers, adapters per request.

The same options serve CPU and GPU; only environment variables differ (``engine_env``). On the CPU
an engine inside the process starts in about half the time of vLLM's three processes.
"""

from __future__ import annotations

import gc
import math
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from trace_ray.config import EngineConfig
from trace_ray.errors import ModelError, TraceRayError
from trace_ray.models.device import fast_bfloat16, has_gpu, release_memory

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values vLLM accepts for ``max_lora_rank``."""

_adapter_numbers: dict[str, int] = {}


@dataclass(frozen=True, slots=True)
class AdapterPath:
    """A LoRA adapter on this machine's disk. One path never holds other weights later."""

    adapter_id: str
    path: str

    @property
    def number(self) -> int:
        """A positive integer for vLLM, the same for the same path within this process."""
        return _adapter_numbers.setdefault(os.path.abspath(self.path), len(_adapter_numbers) + 1)


def engine_env(
    config: EngineConfig, num_cpus: float = 1, gpu: bool | None = None
) -> dict[str, str]:
    """Return the environment of a process that holds an engine.

    Set it before vLLM is imported (Ray: ``runtime_env={"env_vars": ...}``).

    Args:
        config: Engine settings.
        num_cpus: Cores of the engine; becomes its number of threads, at least 1.
        gpu: whether the engine has a GPU; None = where this process sees one.
    """
    env = {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")}
    if offline := os.environ.get("HF_HUB_OFFLINE"):
        env["HF_HUB_OFFLINE"] = offline
    on_gpu = has_gpu() if gpu is None else gpu
    if on_gpu:
        # The engine's process: one forked from a process that has asked for a GPU can't use it.
        return env | {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    if config.enforce_eager:
        # vLLM would still compile what counts a token's rank: seconds, and a C++ compiler, for one sum.
        env["TORCHDYNAMO_DISABLE"] = "1"
    return env | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(math.ceil(config.kv_cache_gb)),
        "OMP_NUM_THREADS": str(max(1, int(num_cpus))),
        # Threads that spin at barriers slow each other down many times over on a shared machine.
        "OMP_WAIT_POLICY": "passive",
    }


def engine_kwargs(config: EngineConfig, model_dir: str, *, lora: bool) -> dict[str, Any]:
    """Return vLLM's engine arguments; the same keys on CPU and GPU.

    Raises:
        ModelError: ``max_lora_rank`` is more than vLLM can hold.
    """
    kwargs: dict[str, Any] = {
        "model": model_dir,
        "dtype": _dtype(config.dtype),
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "block_size": config.block_size,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "tensor_parallel_size": config.tensor_parallel_size,
        "enforce_eager": config.enforce_eager,
        "enable_prefix_caching": True,
        "seed": 0,
    }
    if not lora:
        return kwargs
    rank = next((value for value in _LORA_RANKS if value >= config.max_lora_rank), None)
    if rank is None:
        raise ModelError(f"engine.max_lora_rank: at most {_LORA_RANKS[-1]}")
    return kwargs | {"enable_lora": True, "max_loras": config.max_loras, "max_lora_rank": rank}


def _dtype(wanted: str) -> str:
    if wanted != "auto":
        return wanted
    return "bfloat16" if fast_bfloat16() else "float32"


def _flask_context() -> AbstractContextManager[Any]:
    """Make flask's proxies readable where something (MLflow) has imported flask.

    While it starts, vLLM reads ``__dict__`` of every attribute of every module; such a proxy raises
    RuntimeError outside a request.
    """
    if "flask" not in sys.modules:
        return nullcontext()
    import flask

    return flask.Flask("engine").test_request_context()


def _wake_if_it_dies(core: Any) -> None:
    """Have a call that waits for the engine's process end with EngineDeadError where the process dies.

    vLLM notices too, and then leaves such a call waiting for ever.
    """
    manager = getattr(getattr(core, "resources", None), "engine_manager", None)
    if manager is None:  # the engine lives in this process
        return
    from vllm.v1.engine.exceptions import EngineDeadError

    sentinels = [process.sentinel for process in manager.processes]

    def watch() -> None:
        wait(sentinels)
        core.outputs_queue.put(EngineDeadError())

    threading.Thread(target=watch, name="engine-watch", daemon=True).start()


class Engine:
    """A vLLM engine in this process; one per process at a time."""

    def __init__(
        self, model_dir: str, config: EngineConfig, *, lora: bool, num_cpus: float = 1
    ) -> None:
        """Start the engine.

        Args:
            model_dir: Directory with the model's safetensors, config and tokenizer.
            config: Engine settings.
            lora: Whether requests may name adapters.
            num_cpus: Cores it may use (CPU platform only).

        Raises:
            ModelError: vLLM can't load the model.
        """
        os.environ.update(engine_env(config, num_cpus))
        import torch

        if has_gpu():
            release_memory()
        else:
            torch.set_num_threads(max(1, int(num_cpus)))
        from trace_ray.models.vllm_cpu_lora import register

        register()
        self.model_dir = model_dir
        self._lora = lora
        self._max_tokens = config.max_model_len
        self._kwargs = engine_kwargs(config, model_dir, lora=lora)
        self._start()

    def _start(self) -> None:
        import vllm
        from vllm.exceptions import VLLMError

        try:
            with _flask_context():
                self._llm = vllm.LLM(**self._kwargs)
        except (OSError, ValueError, RuntimeError, VLLMError) as error:
            model_dir = self._kwargs["model"]
            raise ModelError(f"{model_dir}: vLLM can't load this model: {error}") from error
        _wake_if_it_dies(self._llm.llm_engine.engine_core)

    def judge(
        self,
        prompt_token_ids: Sequence[list[int]],
        yes_id: int,
        no_id: int,
        adapters: Sequence[AdapterPath | None],
    ) -> list[tuple[float, float]]:
        """Return the raw log-probabilities of two tokens as the first one of the answer.

        Args:
            prompt_token_ids: One tokenised prompt per request; a shared beginning of at least
                128 tokens is computed once.
            yes_id: Token id of the first of the two.
            no_id: Token id of the second.
            adapters: Per request the adapter, or None for the base model.

        Returns:
            Per request (log p(yes), log p(no)) over the whole vocabulary: they don't sum to 1.
        """
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=1, logprob_token_ids=[yes_id, no_id], detokenize=False
        )
        pairs = []
        for output in self._run(prompt_token_ids, params, adapters):
            logprobs = output.outputs[0].logprobs
            assert logprobs is not None
            pairs.append((logprobs[0][yes_id].logprob, logprobs[0][no_id].logprob))
        return pairs

    def generate(
        self,
        prompt_token_ids: Sequence[list[int]],
        max_new_tokens: int,
        stop_token_ids: Sequence[int] = (),
        adapter: AdapterPath | None = None,
    ) -> list[str]:
        """Return each prompt's greedy answer, without special tokens."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0, max_tokens=max_new_tokens, stop_token_ids=list(stop_token_ids)
        )
        adapters = [adapter] * len(prompt_token_ids)
        return [output.outputs[0].text for output in self._run(prompt_token_ids, params, adapters)]

    def sample(
        self,
        prompt_token_ids: Sequence[list[int]],
        n: int,
        temperature: float,
        max_new_tokens: int,
        stop_token_ids: Sequence[int] = (),
        adapter: AdapterPath | None = None,
    ) -> list[list[str]]:
        """Return ``n`` seeded answers to each prompt, without special tokens."""
        from vllm import SamplingParams

        params = SamplingParams(
            n=n,
            temperature=temperature,
            seed=0,
            max_tokens=max_new_tokens,
            stop_token_ids=list(stop_token_ids),
        )
        adapters = [adapter] * len(prompt_token_ids)
        outputs = self._run(prompt_token_ids, params, adapters)
        return [[answer.text for answer in output.outputs] for output in outputs]

    @property
    def llm_engine(self) -> Any:
        """The engine proper, by the name that it has in ``vllm.LLM``."""
        return self._llm.llm_engine

    def close(self) -> None:
        """Free the engine's memory. The object can't be used afterwards."""
        if hasattr(self, "_llm"):
            self._llm.llm_engine.engine_core.shutdown()
            del self._llm
            gc.collect()

    def _run(
        self,
        prompt_token_ids: Sequence[list[int]],
        params: Any,
        adapters: Sequence[AdapterPath | None],
    ) -> list[Any]:
        for index, ids in enumerate(prompt_token_ids):
            if not 0 < len(ids) < self._max_tokens:
                raise ModelError(
                    f"prompt {index} has {len(ids)} tokens; the engine takes 1 to "
                    f"{self._max_tokens - 1} (raise engine.max_model_len)"
                )
        prompts: list[Any] = [{"prompt_token_ids": ids} for ids in prompt_token_ids]
        requests = [self.request(adapter) for adapter in adapters] if self._lora else None
        if not self._lora and any(adapters):
            raise ModelError("this engine was started without lora=True and can't use an adapter")
        return self.ask(prompts, params, requests)

    def ask(self, prompts: list[Any], params: Any, lora_request: Any) -> list[Any]:
        """Ask vLLM in its own types; an engine whose process has died is started again, once.

        Args:
            prompts: vLLM's.
            params: its sampling parameters, one or one a prompt.
            lora_request: None, one, or one a prompt (``request``).

        Raises:
            ModelError: vLLM refuses a prompt, or died of one twice; the next call starts it again.
            TraceRayError: it died and can't be started again.
        """
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError

        def generate() -> list[Any]:
            return self._llm.generate(prompts, params, lora_request=lora_request, use_tqdm=False)

        try:
            try:
                return generate()
            except EngineDeadError:
                self._start_again()
                return generate()
        except VLLMClientError as error:
            raise ModelError(f"vLLM refuses a prompt: {error}") from error
        except EngineDeadError as error:
            raise ModelError("vLLM's engine died twice over these prompts") from error

    def _start_again(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
        try:
            self._start()
        except ModelError as error:
            # Not a ModelError: that would be taken for a word about the prompts.
            raise TraceRayError(f"the engine's process died: {error}") from error

    def request(self, adapter: AdapterPath | None) -> Any:
        """Return what vLLM calls the adapter; None for the base model."""
        from vllm.lora.request import LoRARequest

        if adapter is None:
            return None
        return LoRARequest(adapter.adapter_id, adapter.number, adapter.path)
