"""The peer of the benchmarks: the published algorithm, written by us as it behaves. No product code.

What it does (and what makes it slow): batch size 1; every exchange padded to 256 tokens; logits and
log-softmax over the whole vocabulary at all 256 positions; two full copies of the model, a policy with
LoRA and a frozen reference. Scoring: per conflict four forwards without gradients (policy and reference
on both responses), then a forward and a backward pass per response to get the conflict's own gradient,
then its dot product with g_J over the LoRA parameters. Training: a loop over rows with the reference's
forwards in every step, gradients accumulated to the effective batch, AdamW.

Mistakes of the published code that are repaired here, so that both sides compute the SAME scores and the
SAME loss and only their cost is compared: the label mask is exactly the response tokens (published: one
token early); the KL mask is shifted with the logits; the gold batch goes through the chat template like
everything else; both sides of a pair follow the same prompt where it is cut to fit; dropout is off while
scores are taken; the terms are divided by the counts of the step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

from trace_ray.config import TrainingConfig
from trace_ray.core import losses
from trace_ray.core.impact import GoldPair
from trace_ray.models.collate import EncodedRow, encode_sides
from trace_ray.models.device import has_gpu
from trace_ray.models.policy_model import load_policy_model, trained_parameters
from trace_ray.types import Category, PreferencePair, TriagedPair

WIDTH = 256
"""Tokens that every exchange is padded to."""
Exchange = tuple[list[int], list[int]]


class Reference:
    """The published algorithm on one model."""

    def __init__(self, base: Path, config: TrainingConfig, *, autocast: bool):
        self.config, self.autocast = config, autocast
        self.device = torch.device("cuda" if has_gpu() else "cpu")
        policy: Any = load_policy_model(base, None, config.lora, seed=config.seed)
        frozen: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.policy, self.frozen = policy.to(self.device), frozen.to(self.device)
        self.frozen.requires_grad_(False).eval()
        self.params: list[Any] = list(trained_parameters(self.policy).values())

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def _predictions(self, model: Any, exchange: Exchange) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits [WIDTH - 1, V], the next tokens and the response mask [WIDTH - 1]."""
        prompt, response = exchange
        ids = torch.zeros(1, WIDTH, dtype=torch.int64, device=self.device)
        seen, answer = torch.zeros_like(ids), torch.zeros(WIDTH, device=self.device)
        end = len(prompt) + len(response)
        ids[0, :end] = torch.tensor([*prompt, *response], device=self.device)
        seen[0, :end] = 1
        answer[len(prompt) : end] = 1
        with self._precision():
            logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits
        return logits[0, :-1].float(), ids[0, 1:], answer[1:]

    def _logp(self, model: Any, exchange: Exchange) -> Tensor:
        logits, labels, answer = self._predictions(model, exchange)
        tokens = F.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]
        return (tokens * answer).sum()

    # Scoring

    def _sides(self, tokenizer: Any, pair: GoldPair | PreferencePair) -> list[Exchange]:
        responses = (pair.chosen, pair.rejected)
        prompt, sides = encode_sides(tokenizer, pair.prompt, responses, self.config.max_length)
        return [(prompt, response) for response, _ in sides]

    def gold_gradient(self, gold: Sequence[GoldPair], tokenizer: Any) -> list[Tensor]:
        """Return g_J, the gradient of the mean preference loss over the gold pairs."""
        self.policy.eval().zero_grad()
        for pair in gold:
            better, worse = self._sides(tokenizer, pair)
            with torch.no_grad():
                reference = self._logp(self.frozen, better) - self._logp(self.frozen, worse)
            margin = self._logp(self.policy, better) - self._logp(self.policy, worse) - reference
            (losses.dpo(margin, self.config.beta) / len(gold)).backward()
        return [p.grad.clone() for p in self.params]

    def score(self, row: TriagedPair, gold_gradient: list[Tensor], tokenizer: Any) -> float:
        """Return <g_J, g> / gamma of one conflict."""
        beta = self.config.beta
        chosen, rejected = self._sides(tokenizer, row.pair)
        with torch.no_grad():
            r_w, r_l = (
                self._logp(self.policy, side) - self._logp(self.frozen, side)
                for side in (chosen, rejected)
            )
        if row.category is Category.INVERT:
            slope = beta * torch.sigmoid(-beta * (r_l - r_w))
            slopes = (slope, -slope)
        else:
            slopes = (beta * torch.sigmoid(beta * r_w), beta * torch.sigmoid(beta * r_l))
        self.policy.zero_grad()
        for slope, side in zip(slopes, (chosen, rejected), strict=True):
            (slope * self._logp(self.policy, side)).backward()
        dots = [(p.grad * g).sum() for p, g in zip(self.params, gold_gradient, strict=True)]
        return float(torch.stack(dots).sum()) / self.config.impact.gamma

    # Training

    def training(self, rows: Sequence[EncodedRow], order: list[int]) -> Iterator[float]:
        """Train one pass over ``order``; each item drawn is one optimizer step's loss."""
        config = self.config
        size = config.batch_size
        steps = len(order) // size
        kinds = [row.category for row in rows]
        retained = kinds.count(Category.RETAIN)
        counts = losses.Denominators.of_step(size, len(rows) - retained, retained)
        optimizer = torch.optim.AdamW(self.params, lr=config.learning_rate, weight_decay=0.0)
        warmup = math.ceil(config.warmup_ratio * steps)
        schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
        self.policy.train()
        for step in range(steps):
            total = 0.0
            for i in order[step * size : (step + 1) * size]:
                loss = self._row_loss(rows[i], counts)
                loss.backward()
                total += float(loss.detach())
            torch.nn.utils.clip_grad_norm_(self.params, config.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            yield total

    def _row_loss(self, row: EncodedRow, counts: losses.Denominators) -> Tensor:
        chosen, rejected = (row.prompt_ids, row.chosen_ids), (row.prompt_ids, row.rejected_ids)
        zero = torch.zeros(1, device=self.device)
        r_w, r_l, kl = zero, zero, zero
        if row.category is Category.RETAIN:
            kl = self._kl(chosen)[None]
        else:
            with torch.no_grad():
                ref_w, ref_l = (self._logp(self.frozen, side) for side in (chosen, rejected))
            r_w = (self._logp(self.policy, chosen) - ref_w)[None]
            r_l = (self._logp(self.policy, rejected) - ref_l)[None]
        terms = losses.HybridTerms(
            chosen_logratio=r_w,
            rejected_logratio=r_l,
            kl=kl,
            category=torch.tensor([losses.CATEGORY_CODES[row.category]], device=self.device),
            weight=torch.tensor([row.weight], device=self.device),
        )
        config = self.config
        return losses.hybrid(terms, counts, beta=config.beta, alpha_kl=config.alpha_kl).loss

    def _kl(self, exchange: Exchange) -> Tensor:
        """KL(pi_ref || pi_theta), over the whole vocabulary at every position, then masked."""
        logits, _, answer = self._predictions(self.policy, exchange)
        with torch.no_grad():
            frozen = F.log_softmax(self._predictions(self.frozen, exchange)[0], -1)
        tokens = F.kl_div(F.log_softmax(logits, -1), frozen, log_target=True, reduction="none")
        return (tokens.sum(-1) * answer).sum() / answer.sum()
