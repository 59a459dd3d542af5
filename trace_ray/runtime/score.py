"""Impact scores of one model over a triaged set: a Ray task around ``core.impact``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trace_ray.config import TrainingConfig
from trace_ray.types import Category, ImpactScore, Prompt, TriagedPair

if TYPE_CHECKING:
    import torch

    from trace_ray.core.impact import GoldPair

Sequences = list[tuple[list[int], list[int]]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ScoreSummary:
    """What scoring one model's conflicts gave."""

    scores: list[ImpactScore]
    gold: list[GoldPair]
    share_clamped: float
    """Share of conflicts whose raw score was not positive: they get no weight."""
    effective_sample_size: float
    uniform_fallback: bool
    """True where no score was positive, so that all weights are 1."""
    method: str
    truncated: int
    """Responses cut to ``max_length``."""


def score_conflicts(
    base: str,
    adapter: str | None,
    triaged: list[TriagedPair],
    config: TrainingConfig,
    *,
    num_threads: int,
    progress: Progress = lambda done, total: None,
) -> ScoreSummary:
    """Score every INVERT and PUNISH row for one model (method: stage 2).

    Args:
        base: directory of the base model.
        adapter: directory of the deployed adapter, or None.
        triaged: all rows; RETAIN rows only feed the gold batch.
        config: the model's training section.
        num_threads: torch threads.
        progress: called with (sequences done, all sequences).
    """
    import torch

    from trace_ray.core import impact, losses
    from trace_ray.models.families import load_tokenizer
    from trace_ray.models.packing import can_pack
    from trace_ray.models.policy_model import load_policy_model, trained_parameters

    torch.set_num_threads(num_threads)
    settings = config.impact
    method = "fd" if settings.method == "auto" else settings.method
    attention = "eager" if method == "jvp" else "sdpa"
    model = load_policy_model(base, adapter, config.lora, seed=config.seed, attention=attention)
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    likelihood = _Likelihood(model, pack=can_pack(model.config, config.max_length))
    encoder = _Encoder(load_tokenizer(base), config.max_length)
    params = trained_parameters(model)
    gold = impact.gold_batch(triaged, settings.gold_batch, config.seed)
    direction = _gold_gradient(likelihood, params, encoder, gold, config)

    conflicts = [row for row in triaged if row.category in (Category.INVERT, Category.PUNISH)]
    engine = {"jvp": impact.jvp_derivatives, "fd": impact.fd_derivatives}[method]
    derive = functools.partial(
        likelihood.derivatives,
        engine,
        params,
        direction,
        batch_size=settings.batch_size,
        progress=progress,
    )
    d_chosen, d_rejected = _sides(conflicts, encoder, derive)
    codes = torch.tensor([losses.CATEGORY_CODES[row.category] for row in conflicts])
    raw = impact.scores_from_derivatives(codes, d_chosen, d_rejected, config.beta, settings.gamma)
    summary = impact.weights(raw, settings.weights)
    scores = [
        ImpactScore(row.pair_id, float(value), float(weight))
        for row, value, weight in zip(conflicts, raw, summary.weights, strict=True)
    ]
    return ScoreSummary(
        scores,
        gold,
        summary.share_clamped,
        summary.effective_sample_size,
        summary.fallback_uniform,
        method,
        encoder.truncated,
    )


class _Encoder:
    """Tokenises exchanges and counts those that were cut."""

    def __init__(self, tokenizer: Any, max_length: int):
        self.tokenizer, self.max_length, self.truncated = tokenizer, max_length, 0

    def __call__(self, prompt: Prompt, response: str) -> tuple[list[int], list[int]]:
        from trace_ray.models.collate import encode_exchange

        prompt_ids, ids, cut = encode_exchange(self.tokenizer, prompt, response, self.max_length)
        self.truncated += cut
        return prompt_ids, ids


def _sides(
    conflicts: list[TriagedPair], encoder: _Encoder, derive: Callable[[Sequences], list[float]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return d(y_w) and d(y_l) of every conflict, [N] float64; each distinct response once."""
    import torch

    sides = [
        (row.pair.prompt, text)
        for row in conflicts
        for text in (row.pair.chosen, row.pair.rejected)
    ]
    distinct = list(dict.fromkeys(sides))
    found = dict(zip(distinct, derive([encoder(*side) for side in distinct]), strict=True))
    values = torch.tensor([found[side] for side in sides], dtype=torch.float64).reshape(-1, 2)
    return values[:, 0], values[:, 1]


class _Likelihood:
    """log pi(y|x) of encoded exchanges under one model, at its own or at other parameters."""

    def __init__(self, model: Any, *, pack: bool):
        self.model, self.pack = model, pack

    def __call__(
        self, sequences: Sequences, params: dict[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Return the log-probabilities [S] of the responses, float32."""
        from torch.func import functional_call

        from trace_ray.core import logprobs
        from trace_ray.models.collate import pad_sequences
        from trace_ray.models.packing import pack_exchanges
        from trace_ray.models.trainer import response_logits

        def at_params(**inputs: Any) -> Any:
            return functional_call(self.model, params or {}, kwargs=inputs)

        at_params.dtype = self.model.dtype  # pyright: ignore[reportFunctionMemberAccess]

        lay_out = pack_exchanges if self.pack else pad_sequences
        batch = {k: v.to(self.model.device) for k, v in lay_out(sequences).items()}
        logits, at = response_logits(self.model if params is None else at_params, batch)
        return logprobs.sequence_logps(logits, batch["labels"], batch["mask"], at)

    def derivatives(
        self,
        engine: Callable[..., torch.Tensor],
        params: dict[str, torch.Tensor],
        direction: dict[str, torch.Tensor],
        encoded: Sequences,
        batch_size: int,
        progress: Progress,
    ) -> list[float]:
        """Return the derivative of every sequence's log-probability along ``direction``, in order."""
        order = list(range(len(encoded)))
        if not self.pack:
            # Batches of like length: little padding.
            order.sort(key=lambda i: len(encoded[i][0]) + len(encoded[i][1]))
        values = [0.0] * len(encoded)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            logps = functools.partial(self, [encoded[i] for i in part])
            for i, value in zip(part, engine(logps, params, direction).tolist(), strict=True):
                values[i] = value
            progress(min(start + batch_size, len(order)), len(order))
        return values


def _gold_gradient(
    likelihood: _Likelihood,
    params: dict[str, torch.Tensor],
    encoder: _Encoder,
    gold: list[GoldPair],
    config: TrainingConfig,
) -> dict[str, torch.Tensor]:
    """g_J: the gradient of the mean preference loss over the gold batch at theta_ref (Algorithm 2)."""
    from trace_ray.core import impact

    size = max(1, config.impact.batch_size // 2)
    rows = [(encoder(g.prompt, g.chosen), encoder(g.prompt, g.rejected)) for g in gold]
    rows.sort(key=lambda row: sum(map(len, (*row[0], *row[1]))))

    def objectives() -> Iterator[torch.Tensor]:
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            preferred, other = likelihood([a for a, _ in part] + [b for _, b in part]).chunk(2)
            yield impact.gold_objective(preferred, other, config.beta, len(rows))

    return impact.gold_gradient(objectives(), params)
