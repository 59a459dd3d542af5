"""Raw impact scores of one loaded model (method: stage 2): g_J once, then <g_J, g> of every conflict.

Where prefixes can be shared, ``ghost`` gives each conflict a row that holds both its responses behind
their one prompt: the backward pass is seeded with what each response contributes to the conflict's
score, so that tokens of both cost once and need no telling apart. ``jvp`` and ``fd`` read a derivative
per response off one pass, so their rows hold the distinct responses to a prompt, whatever
conflicts these belong to. In padded batches every distinct response has its own row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trace_ray.config import ImpactConfig, TrainingConfig
from trace_ray.core import derivatives, impact, losses
from trace_ray.core.derivatives import Params
from trace_ray.errors import DataError
from trace_ray.models.collate import encode_exchange
from trace_ray.models.families import load_tokenizer
from trace_ray.models.likelihood import Exchange, Likelihood, Line
from trace_ray.models.packing import can_pack
from trace_ray.models.policy_model import load_policy_model, trained_parameters
from trace_ray.types import Category, Prompt, response_id

if TYPE_CHECKING:
    from trace_ray.core.impact import GoldPair

Progress = Callable[[int, int], None]
LOGITS = 2**26
"""Most logits of one forward pass (256 MiB in float32), whatever the vocabulary."""
NEIGHBOURS = 8
"""Most responses to one prompt in one row: attention costs the square of a row's tokens."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """An INVERT or PUNISH row in its ORIGINAL order, under the id its score goes by."""

    pair_id: str
    prompt: Prompt
    chosen: str
    rejected: str
    category: Category


def chosen_method(settings: ImpactConfig) -> str:
    """Return the engine that ``impact.method`` stands for on this machine.

    ``auto`` is ``ghost``: on the CPU by benchmarks/impact_methods.py; on a GPU, untested, because it
    alone is exact with fused attention and in low precision.
    """
    return "ghost" if settings.method == "auto" else settings.method


class Scorer:
    """A loaded model that gives g_J and raw scores."""

    def __init__(self, base: str | Path, adapter: str | Path | None, config: TrainingConfig):
        """Load the model as it is deployed (theta_ref), in float32.

        Args:
            base: directory of the base model.
            adapter: directory of the deployed adapter, or None.
            config: the model's training section.
        """
        self.config = config
        self.method = chosen_method(config.impact)
        attention = "eager" if self.method == "jvp" else "sdpa"
        model = load_policy_model(base, adapter, config.lora, seed=config.seed, attention=attention)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = load_tokenizer(base)
        self.params = trained_parameters(model)
        self.likelihood = Likelihood(model, pack=can_pack(model.config, config.max_length))
        self.vocabulary: int = model.config.get_text_config().vocab_size
        self.truncated: set[str] = set()
        """Ids of the distinct responses that lost text, or some of their prompt, to ``max_length``."""

    def direction(self, gold: Sequence[GoldPair]) -> Params:
        """Return g_J, the gradient of the mean DPO loss over the gold batch; P g_J for ``adam``.

        Raises:
            DataError: the gold batch is empty, or its gradient is NaN or infinite.
        """
        pairs = [self.encode(g.prompt, g.chosen, g.rejected) for g in gold]
        adam = self.config.impact.preconditioner == "adam"
        parts = [[i] for i in range(len(pairs))] if adam else self.batches(pairs)
        n_gold = 1 if adam else len(pairs)

        def objectives() -> Iterator[torch.Tensor]:
            for part in parts:
                sides = [pairs[i] for i in part]
                if not self.likelihood.pack:
                    sides = [[side] for pair in sides for side in pair]
                preferred, other = self.likelihood(sides).view(-1, 2).unbind(1)
                yield impact.gold_objective(preferred, other, self.config.beta, n_gold)

        impact.check_gold(len(gold))
        if adam:
            found = impact.precondition(*impact.gold_moments(objectives(), self.params))
        else:
            found = impact.gold_gradient(objectives(), self.params)
        if not all(bool(g.isfinite().all()) for g in found.values()):
            ids = ", ".join(g.pair_id for g in gold[:5])
            raise DataError(
                "the gold batch's gradient is NaN or infinite: the model's weights or its deployed "
                f"adapter are damaged, or a gold pair is (the first: {ids})"
            )
        return found

    def raw_scores(
        self,
        conflicts: Sequence[Conflict],
        direction: Params,
        progress: Progress = lambda done, total: None,
    ) -> list[float]:
        """Return <g_J, g> / gamma of every conflict, in order.

        Args:
            conflicts: INVERT and PUNISH rows.
            direction: g_J.
            progress: called with (rows done, all rows) of the batches, first with 0.
        """
        progress(0, len(conflicts))
        pairs = [self.encode(row.prompt, row.chosen, row.rejected) for row in conflicts]
        codes = torch.tensor([losses.CATEGORY_CODES[row.category] for row in conflicts])

        def scores(d_chosen: torch.Tensor, d_rejected: torch.Tensor) -> torch.Tensor:
            gamma = self.config.impact.gamma
            return impact.scores_from_derivatives(
                codes, d_chosen, d_rejected, self.config.beta, gamma
            )

        derive = functools.partial(self._derive, direction=direction, progress=progress)
        if self.method == "ghost" and self.likelihood.pack:
            one, zero = torch.ones(len(pairs)), torch.zeros(len(pairs))
            seeds = torch.stack([scores(one, zero), scores(zero, one)], 1)
            return [value for (value,) in derive(pairs, seeds.tolist())]
        groups = _by_prompt(pairs, most=NEIGHBOURS if self.likelihood.pack else 1)
        d = {
            _key(side): value
            for group, values in zip(groups, derive(groups), strict=True)
            for side, value in zip(group, values, strict=True)
        }
        sides = [[d[_key(side)] for side in pair] for pair in pairs]
        found = torch.tensor(sides, dtype=torch.float64)
        return scores(found[:, 0], found[:, 1]).tolist()

    def _derive(
        self,
        groups: list[list[Exchange]],
        seeds: list[list[float]] | None = None,
        *,
        direction: Params,
        progress: Progress,
    ) -> list[list[float]]:
        """Return the derivative of every exchange of each group; with ``seeds``, of their weighted sum."""
        line = Line(self.likelihood.model, direction)
        length = derivatives.length_of(direction)
        found: list[list[float]] = [[] for _ in groups]
        done = 0
        with line.merged():
            for part in self.batches(groups):
                batch = [groups[i] for i in part]
                weights = [seed for i in part for seed in seeds[i]] if seeds else None
                values_at = functools.partial(self._values_at, line, batch, weights)
                steps = torch.zeros(len(batch), device=self.likelihood.model.device)
                if self.method == "fd":
                    values = derivatives.fd_derivatives(values_at, steps, length)
                elif self.method == "jvp":
                    values = derivatives.jvp_derivatives(values_at, steps)
                else:
                    values = derivatives.ghost_derivatives(values_at, steps)
                sizes = [1 if seeds else len(group) for group in batch]
                for i, part_values in zip(part, values.split(sizes), strict=True):
                    found[i] = part_values.tolist()
                done += len(part)
                progress(done, len(groups))
        return found

    def _values_at(
        self,
        line: Line,
        batch: list[list[Exchange]],
        weights: list[float] | None,
        steps: torch.Tensor,
    ) -> torch.Tensor:
        with line.at(steps):
            logps = self.likelihood(batch)
        return logps if weights is None else logps * logps.new_tensor(weights)

    def encode(self, prompt: Prompt, *responses: str) -> list[Exchange]:
        """Encode a pair's sides; both get the prompt that is left beside the longer one."""
        limit = self.config.max_length
        sides = [encode_exchange(self.tokenizer, prompt, text, limit) for text in responses]
        for text, (_, _, cut) in zip(responses, sides, strict=True):
            if cut:
                self.truncated.add(response_id(prompt, text))
        prompt_ids = min((ids for ids, _, _ in sides), key=len)
        return [(prompt_ids, ids) for _, ids, _ in sides]

    def batches(self, groups: Sequence[Sequence[Exchange]]) -> list[list[int]]:
        """Cut groups, sorted by length, into batches of ``batch_tokens`` and at most ``LOGITS``."""
        sizes = [len(group[0][0]) + sum(len(response) for _, response in group) for group in groups]
        found: list[list[int]] = []
        predicted = 0
        for i in sorted(range(len(groups)), key=lambda i: -sizes[i]):
            more = sum(len(response) for _, response in groups[i])
            part = found[-1] if found else []
            fits = part and sizes[part[0]] * (len(part) + 1) <= self.config.impact.batch_tokens
            if fits and (predicted + more) * self.vocabulary <= LOGITS:
                part.append(i)
                predicted += more
            else:
                found.append([i])
                predicted = more
        return found


def _key(side: Exchange) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(side[0]), tuple(side[1])


def _by_prompt(pairs: Sequence[Sequence[Exchange]], most: int) -> list[list[Exchange]]:
    """Group the distinct exchanges by their prompt, at most ``most`` to a group."""
    of_prompt: dict[tuple[int, ...], list[Exchange]] = {}
    for prompt, response in dict.fromkeys(_key(side) for pair in pairs for side in pair):
        of_prompt.setdefault(prompt, []).append((list(prompt), list(response)))
    return [sides[i : i + most] for sides in of_prompt.values() for i in range(0, len(sides), most)]
