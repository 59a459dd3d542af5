"""lm-evaluation-harness on an engine that runs already: one engine, every adapter in turn."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from typing import Any
from unittest import mock

import vllm
from lm_eval.models.utils import normalize_gen_kwargs, resolve_max_length

from trace_ray.errors import DataError
from trace_ray.models.engine import AdapterPath, Engine


def _version(name: str, of: Any = importlib.metadata.version) -> str:
    return vllm.__version__ if name == "vllm" else of(name)


# The harness looks vLLM's version up by a name that its build for CPUs doesn't have.
with mock.patch.object(importlib.metadata, "version", _version):
    from lm_eval.models import vllm_causallms

_HarnessVLLM: Any = vllm_causallms.VLLM  # a decorator hides its type
_BATCH_SIZE = 512
"""Requests at a time: the log-probabilities of all their tokens are held at once."""


class HarnessModel(_HarnessVLLM):
    """The harness's vLLM model; where that would start an engine it gets ``engine``."""

    def __init__(self, engine: Engine, adapter: AdapterPath | None) -> None:
        """Wrap ``engine``, started with ``lora=True``, as it answers with ``adapter``."""
        self._engine = engine
        with mock.patch.object(vllm_causallms, "LLM", return_value=engine):
            super().__init__(engine.model_dir, batch_size=_BATCH_SIZE)
        self.lora_request: Any = engine.request(adapter)
        own = resolve_max_length(self._config, self.tokenizer, default=self._DEFAULT_MAX_LENGTH)
        self._cut_short = self.max_length < own

    def _model_generate(
        self, requests: list[list[int]], generate: bool = False, sampling_params: Any = None
    ) -> Any:
        if not generate:
            sampling_params = vllm.SamplingParams(
                temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False
            )
        prompts = [{"prompt_token_ids": ids} for ids in requests]
        return self._engine.ask(prompts, sampling_params, self.lora_request)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False) -> Any:
        self._check_room(len(start) + len(end) + 1 for _, start, end in requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Answer freely; raises DataError where the engine has no room for a prompt and its answer."""
        starts = self.tok_encode([request.args[0] for request in requests])
        given = [normalize_gen_kwargs(request.args[1], self.max_gen_toks) for request in requests]
        limits = [each.get("max_gen_toks", 0) for each in given]
        self._check_room(len(ids) + n for ids, n in zip(starts, limits, strict=True))
        return super().generate_until(requests, disable_tqdm)

    def _check_room(self, lengths: Iterable[int]) -> None:
        """Refuse to cut items that the model, but not its engine, has room for.

        Raises:
            DataError: there are such items.
        """
        longest = max(lengths, default=0)
        if self._cut_short and longest > self.max_length:
            raise DataError(
                f"evaluation.tasks: an item takes {longest} tokens with its answer, the engine "
                f"{self.max_length}: raise the model's engine.max_model_len"
            )
