"""Raw impact scores of one loaded model (method: stage 2): g_J once, then <g_J, g> of every conflict.

Where prefixes can be shared, ``ghost`` gives each conflict a row that holds both its responses behind
their one prompt: the backward pass is seeded with what each response contributes to the conflict's
score, so that tokens of both cost once and need no telling apart. ``jvp`` and ``fd`` read a derivative
per response off one pass, so their rows hold the distinct responses to a prompt, whatever
conflicts these belong to. In padded batches every distinct response has its own row.

What most prompts begin with (a chat template's system message) is computed once for all.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trace_ray.config import ImpactConfig, TrainingConfig
from trace_ray.core import derivatives, impact, losses
from trace_ray.core.derivatives import Params
from trace_ray.errors import DataError
from trace_ray.models.collate import encode_sides
from trace_ray.models.families import load_tokenizer
from trace_ray.models.likelihood import Exchange, Head, Likelihood, Line
from trace_ray.models.packing import can_pack
from trace_ray.models.policy_model import load_policy_model, trained_parameters
from trace_ray.models.team import ALONE, Team
from trace_ray.types import Category, Prompt, response_id

if TYPE_CHECKING:
    from trace_ray.core.impact import GoldPair

Progress = Callable[[int, int], None]
LOGITS = 2**26
"""Most logits of one forward pass (256 MiB in float32), whatever the vocabulary."""
NEIGHBOURS = 8
"""Most responses to one prompt in one row: attention costs the square of a row's tokens."""
SHORTEST_HEAD, FOLLOWERS = 12, 8
"""Tokens, and prompts that begin with them, from which on a common beginning is computed apart."""


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

    def __init__(
        self,
        base: str | Path,
        adapter: str | Path | None,
        config: TrainingConfig,
        team: Team = ALONE,
    ):
        """Load the model as it is deployed (theta_ref), in ``base_dtype``.

        Args:
            base: directory of the base model.
            adapter: directory of the deployed adapter, or None.
            config: the model's training section.
            team: workers that share the base's weights; each calls every method with the same arguments,
                and gets the same result.
        """
        self.config, self.team = config, team
        self.method = chosen_method(config.impact)
        attention = "eager" if self.method == "jvp" else "sdpa"
        model = load_policy_model(
            base,
            adapter,
            config.lora,
            seed=config.seed,
            attention=attention,
            dtype=config.base_dtype,
            shards=team.workers,
        )
        if team == ALONE:  # a share of the weights is in its place already
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
            DataError: the gold batch is empty, or its gradient is zero, NaN or infinite.
        """
        impact.check_gold(len(gold))
        pairs = [self.encode(g.prompt, g.chosen, g.rejected) for g in gold]
        alike = sum(preferred == other for preferred, other in pairs)
        if alike == len(pairs):  # in padded rows rounding can leave more than nothing of it
            raise self._no_direction(alike, len(pairs))
        adam = self.config.impact.preconditioner == "adam"
        parts = [[i] for i in range(len(pairs))] if adam else self.batches(pairs)
        n_gold = 1 if adam else len(pairs)

        def objectives() -> Iterator[torch.Tensor]:
            for part, counts in self.team.share(parts):
                sides = [pairs[i] for i in part]
                if not self.likelihood.pack:
                    sides = [[side] for pair in sides for side in pair]
                preferred, other = self.likelihood(sides).view(-1, 2).unbind(1)
                yield counts * impact.gold_objective(preferred, other, self.config.beta, n_gold)

        with self._precision():
            if adam:
                first, second = impact.gold_moments(objectives(), self.params, len(pairs))
                found = impact.precondition(self.team.summed(first), self.team.summed(second))
            else:
                found = self.team.summed(impact.gold_gradient(objectives(), self.params))
        if not all(bool(g.isfinite().all()) for g in found.values()):
            ids = ", ".join(g.pair_id for g in gold[:5])
            raise DataError(
                "the gold batch's gradient is NaN or infinite: the model's weights or its deployed "
                f"adapter are damaged, or a gold pair is (the first: {ids})"
            )
        if not any(bool(g.any()) for g in found.values()):
            raise self._no_direction(alike, len(pairs))
        return found

    def _no_direction(self, alike: int, n_gold: int) -> DataError:
        why = "the deployed adapter's weights are all zero, or as good as"
        if alike:
            why = (
                f"{alike} of its {n_gold} pairs have two sides that are the same tokens within "
                f"training.max_length (--max-length) {self.config.max_length}; raise it, or take gold "
                "pairs that differ earlier"
            )
        return DataError(
            "the gold batch's gradient is exactly zero, so there is nothing to score conflicts against: "
            + why
        )

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
        scale = derivatives.scale_of(direction)
        found: dict[int, list[float]] = {}
        done = 0
        # Neither goes with weights of which only a share is here.
        whole = self.team == ALONE
        can_share = whole and self.likelihood.pack
        common = common_head([group[0][0] for group in groups]) if can_share else []
        headed = {i for i, group in enumerate(groups) if common and _begins(group[0][0], common)}
        with line.merged() if whole else nullcontext(), self._precision():
            head = line.head(common) if headed else None
            for part, counts in self.team.share(self.batches(groups, headed)):
                batch = [groups[i] for i in part]
                weights = [seed for i in part for seed in seeds[i]] if seeds else None
                shared = head if part[0] in headed else None
                values_at = functools.partial(self._values_at, line, shared, batch, weights)
                steps = torch.zeros(len(batch), device=self.likelihood.model.device)
                if self.method == "fd":
                    values = derivatives.fd_derivatives(values_at, steps, scale)
                elif self.method == "jvp":
                    values = derivatives.jvp_derivatives(values_at, steps)
                else:
                    values = derivatives.ghost_derivatives(values_at, steps)
                sizes = [1 if seeds else len(group) for group in batch]
                if counts:
                    split = values.split(sizes)
                    found |= {i: each.tolist() for i, each in zip(part, split, strict=True)}
                done = min(len(groups), done + len(part) * self.team.workers)
                progress(done, len(groups))
        found = self.team.together(found)
        return [found[i] for i in range(len(groups))]

    def _values_at(
        self,
        line: Line,
        head: Head | None,
        batch: list[list[Exchange]],
        weights: list[float] | None,
        steps: torch.Tensor,
    ) -> torch.Tensor:
        with line.at(steps):
            logps = self.likelihood(batch, head, steps)
        return logps if weights is None else logps * logps.new_tensor(weights)

    def _precision(self) -> torch.autocast:
        """Return the context of the passes; the backward pass takes the forward pass's precision."""
        bf16 = self.config.impact.autocast == "bfloat16"
        return torch.autocast(self.likelihood.model.device.type, torch.bfloat16, enabled=bf16)

    def encode(self, prompt: Prompt, *responses: str) -> list[Exchange]:
        """Encode a pair's sides behind their one prompt."""
        limit = self.config.max_length
        prompt_ids, sides = encode_sides(self.tokenizer, prompt, responses, limit)
        for text, (_, cut) in zip(responses, sides, strict=True):
            if cut:
                self.truncated.add(response_id(prompt, text))
        return [(prompt_ids, ids) for ids, _ in sides]

    def batches(
        self, groups: Sequence[Sequence[Exchange]], apart: Collection[int] = ()
    ) -> list[list[int]]:
        """Cut groups, sorted by length, into batches of ``batch_tokens`` and at most ``LOGITS``.

        Groups whose places are in ``apart`` are never mixed with the others.
        """
        sizes = [len(group[0][0]) + sum(len(response) for _, response in group) for group in groups]
        found: list[list[int]] = []
        predicted = 0
        for i in sorted(range(len(groups)), key=lambda i: (i in apart, -sizes[i])):
            more = sum(len(response) for _, response in groups[i])
            part = found[-1] if found else []
            alike = part and (part[0] in apart) == (i in apart)
            fits = alike and sizes[part[0]] * (len(part) + 1) <= self.config.impact.batch_tokens
            if fits and (predicted + more) * self.vocabulary <= LOGITS:
                part.append(i)
                predicted += more
            else:
                found.append([i])
                predicted = more
        return found


def common_head(prompts: Sequence[list[int]]) -> list[int]:
    """Return what most prompts begin with, where computing it once saves work; else nothing.

    Follows the commonest next token for as long as at least half of the prompts go along, and stops
    short of any prompt's last token, which predicts the response.
    """
    head: list[int] = []
    along = [prompt[:-1] for prompt in prompts]
    while True:
        at = Counter(prompt[len(head)] for prompt in along if len(prompt) > len(head))
        token, n = at.most_common(1)[0] if at else (0, 0)
        if n < max(FOLLOWERS, len(prompts) / 2):
            break
        along = [p for p in along if len(p) > len(head) and p[len(head)] == token]
        head.append(token)
    return head if len(head) >= SHORTEST_HEAD else []


def _begins(prompt: list[int], head: list[int]) -> bool:
    return len(prompt) > len(head) and prompt[: len(head)] == head


def _key(side: Exchange) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(side[0]), tuple(side[1])


def _by_prompt(pairs: Sequence[Sequence[Exchange]], most: int) -> list[list[Exchange]]:
    """Group the distinct exchanges by their prompt, at most ``most`` to a group."""
    of_prompt: dict[tuple[int, ...], list[Exchange]] = {}
    for prompt, response in dict.fromkeys(_key(side) for pair in pairs for side in pair):
        of_prompt.setdefault(prompt, []).append((list(prompt), list(response)))
    return [sides[i : i + most] for sides in of_prompt.values() for i in range(0, len(sides), most)]
