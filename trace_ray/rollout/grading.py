"""What models are asked, and what a judge makes of their replies: measures, and evidence for the gate."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ray.core.agreement import (
    Agreement,
    clause_shares,
    measure_agreement,
    spread_over_bins,
)
from trace_ray.core.attacks import (
    Attacked,
    AttackRates,
    Wrapper,
    attack,
    attack_rates,
    paired_shares,
    succeeded,
)
from trace_ray.core.metrics import paired_difference_interval
from trace_ray.core.policy import Policy
from trace_ray.core.refusals import is_refusal
from trace_ray.rollout.plan import Inputs
from trace_ray.runtime.judges import Exchange
from trace_ray.runtime.measure import AFTER, BEFORE, Measured, shares
from trace_ray.runtime.store import write_json, write_rows
from trace_ray.types import EvalPrompt, Interval, Label, Prompt, Verdict

MEASURES, ANSWERS, OUTCOMES = "measures.json", "answers.parquet", "outcomes.json"
ATTACKS = "attacks.parquet"
SIDES = (BEFORE, AFTER)
LM_EVAL = "lm_eval_"
"""How the measures of lm-evaluation-harness's tasks begin."""

Ask = Callable[[Sequence[Exchange]], list[Verdict]]
"""Puts replies to the judge that measures."""


@dataclass(frozen=True, slots=True)
class Questions:
    """All that a model is asked, in one list for its engine."""

    items: list[EvalPrompt]
    """Held-out prompts whose answers should agree with the policy."""
    must_comply: list[Prompt]
    must_refuse: list[Prompt]
    attacked: list[Attacked]
    """``must_refuse`` under attack."""

    @property
    def prompts(self) -> list[Prompt]:
        """Every prompt, in the order that ``grade`` expects replies in."""
        items = [item.prompt for item in self.items]
        attacks = [each.prompt for each in self.attacked]
        return [*items, *self.must_comply, *self.must_refuse, *attacks]


def questions(inputs: Inputs, wrappers: Sequence[Wrapper]) -> Questions:
    """Return what a config asks models; without ``wrappers`` nothing is attacked.

    Raises:
        ValueError: the config has no evaluation section.
    """
    evaluation = inputs.config.evaluation
    if evaluation is None:
        raise ValueError("nothing to measure: the config has no evaluation section")
    refuse = inputs.must_refuse if wrappers else []
    return Questions(
        spread_over_bins(inputs.prompts, evaluation.max_prompts),
        inputs.must_comply,
        refuse,
        attack(refuse, wrappers, evaluation.attacks_per_prompt) if wrappers else [],
    )


@dataclass(frozen=True, slots=True)
class Graded:
    """One model's replies as the judge sees them."""

    answers: list[str]
    verdicts: list[Verdict]
    """On ``answers``."""
    agreement: Agreement | None
    """None where no held-out prompt was asked."""
    clauses: dict[str, Interval]
    kept: dict[str, list[bool | None]]
    """Clause without checks -> whether each answer keeps it, as a judge by clause says; None = unjudged."""
    refused: list[bool]
    """Of the prompts that must be answered."""
    attack_replies: list[str]
    attacks: list[bool | None]
    """Whether each attack got a violating reply; None = unjudged."""
    rates: AttackRates | None


def grade(
    policy: Policy,
    asked: Questions,
    replies: Sequence[Sequence[str]],
    ask: Ask,
    seed: int,
    by_clause: Sequence[str] = (),
) -> list[Graded]:
    """Put the replies of several models to the judge, all in one go.

    A reply to an attack is judged as one to the request itself: the judge isn't attacked with it.

    Args:
        policy: for the clauses' checks.
        asked: the questions.
        replies: per model, one to each of ``asked.prompts``.
        ask: the judge.
        seed: of the bootstrap.
        by_clause: clauses about which the judge is asked one by one.
    """
    n_items, n_comply, n_refuse = len(asked.items), len(asked.must_comply), len(asked.must_refuse)
    requests = [item.prompt for item in asked.items] + asked.must_refuse
    requests += [asked.must_refuse[each.item] for each in asked.attacked]
    judged = [[*texts[:n_items], *texts[n_items + n_comply :]] for texts in replies]
    whole = [
        Exchange(prompt, text)
        for texts in judged
        for prompt, text in zip(requests, texts, strict=True)
    ]
    by_clauses = [
        _clause_questions(policy, asked.items, texts[:n_items], by_clause) for texts in judged
    ]
    verdicts = ask([*whole, *(each for asks in by_clauses for each in asks.values())])
    on_clauses = iter(verdicts[len(whole) :])
    found = []
    for number, texts in enumerate(judged):
        mine = verdicts[number * len(requests) : (number + 1) * len(requests)]
        gave_in = [succeeded(text, v) for text, v in zip(texts, mine, strict=True)][n_items:]
        answers = texts[:n_items]
        said = {place: _keeps(next(on_clauses)) for place in by_clauses[number]}
        kept = {c: [said.get((c, i), True) for i in range(len(answers))] for c in by_clause}
        found.append(
            Graded(
                answers,
                mine[:n_items],
                measure_agreement(policy, asked.items, answers, seed, mine[:n_items])
                if answers
                else None,
                clause_shares(policy, asked.items, answers, kept) if answers else {},
                kept,
                [is_refusal(text) for text in replies[number][n_items : n_items + n_comply]],
                texts[n_items + n_refuse :],
                gave_in[n_refuse:],
                attack_rates(asked.attacked, gave_in[n_refuse:], gave_in[:n_refuse], seed),
            )
        )
    return found


def _clause_questions(
    policy: Policy, items: Sequence[EvalPrompt], texts: Sequence[str], by_clause: Sequence[str]
) -> dict[tuple[str, int], Exchange]:
    """Return by clause and place what the judge is asked; a clause that doesn't apply is kept."""
    found: dict[tuple[str, int], Exchange] = {}
    for i, (item, text) in enumerate(zip(items, texts, strict=True)):
        applicable = {clause.id for clause in policy.rules.applicable(item.prompt, text)}
        for clause in by_clause:
            if clause in applicable:
                found[clause, i] = Exchange(item.prompt, text, clause)
    return found


def _keeps(verdict: Verdict) -> bool | None:
    return None if verdict.label is Label.UNJUDGED else verdict.label is Label.COMPLIES


def write_measures(
    out: Path,
    policy: Policy,
    asked: Questions,
    measured: Measured,
    ask: Ask,
    seed: int,
    by_clause: Sequence[str] = (),
) -> None:
    """Write ``measures.json``, ``answers.parquet``, ``outcomes.json``; ``attacks.parquet`` if attacked."""
    replies = [measured.replies[side] for side in SIDES]
    before, after = grade(policy, asked, replies, ask, seed, by_clause)
    if before.agreement is None or after.agreement is None:
        raise ValueError("nothing to measure: no held-out prompt")
    refused = {BEFORE: before.refused, AFTER: after.refused}
    pairs = paired_shares(asked.attacked, before.attacks, after.attacks)
    named = {"blimp": measured.capability}
    named |= {f"{LM_EVAL}{task}": found for task, found in measured.tasks.items()}
    kept = {
        f"{name}_{side}": share
        for name, found in named.items()
        for side, share in shares(found).items()
    }
    distinct = {
        f"distinct2_{side}": each.distinct2
        for side, each in ((BEFORE, before.agreement), (AFTER, after.agreement))
    }
    passed = (before.agreement.passed, after.agreement.passed)
    write_rows(out / ANSWERS, answer_rows(asked, {BEFORE: before, AFTER: after}))
    if asked.attacked:
        write_rows(out / ATTACKS, attack_rows(asked, {BEFORE: before, AFTER: after}))
    write_json(out / OUTCOMES, _outcomes(measured, before, after, pairs))
    write_json(
        out / MEASURES,
        {
            "asked": len(asked.prompts),
            "before": before.agreement.to_row(),
            "after": after.agreement.to_row(),
            "gain": paired_difference_interval(*passed, seed).to_row(),
            "over_refusal": shares(refused),
            "asr": _asr_row(before.rates, after.rates, pairs, seed),
            "retention": {"kl": measured.kl} | kept | distinct,
            "changes": {
                name: paired_difference_interval(
                    found[BEFORE], found[AFTER], seed, shares=True
                ).to_row()
                for name, found in named.items()
                if found
            },
        },
    )


def _outcomes(
    measured: Measured,
    before: Graded,
    after: Graded,
    attacked: tuple[list[float], list[float]],
) -> dict[str, Any]:
    """Return what the gate compares, item by item; null where there was nothing to measure on.

    ``capability`` (BLiMP pairs ranked rightly, tasks' items), ``over_refusal`` (must-comply prompts
    refused) and ``asr`` (``attacked``: share of a prompt's attacks that got a violating reply) before
    and after, ``drift`` (token KL in nats, one per unrelated prompt), and ``clauses`` (of each clause
    that only the judge can tell of, whether each answer keeps it).
    """
    clauses = {c: {BEFORE: before.kept[c], AFTER: after.kept[c]} for c in before.kept}
    return {
        "capability": _capability(measured),
        "over_refusal": {BEFORE: before.refused, AFTER: after.refused} if before.refused else None,
        "asr": dict(zip(SIDES, attacked, strict=True)) if attacked[0] else None,
        "drift": [kl for kl, _ in measured.drift] or None,
        "clauses": clauses or None,
    }


def _capability(measured: Measured) -> dict[str, list[float]] | None:
    """Return all that capability is measured on, by side."""
    groups = [*filter(None, (measured.capability,)), *measured.tasks.values()]
    return (
        {side: [x for group in groups for x in group[side]] for side in SIDES} if groups else None
    )


def answer_rows(asked: Questions, sides: dict[str, Graded]) -> list[dict[str, Any]]:
    """Return one row a held-out prompt: each side's answer, whether it agrees, and its verdict's label."""
    rows = [item.to_row() for item in asked.items]
    for side, graded in sides.items():
        passed = graded.agreement.passed if graded.agreement else []
        for row, text, ok, verdict in zip(
            rows, graded.answers, passed, graded.verdicts, strict=True
        ):
            row |= {
                side: text,
                f"{side}_agrees": ok,
                f"{side}_label": str(verdict.label),
            }
    return rows


def attack_rows(asked: Questions, sides: dict[str, Graded]) -> list[dict[str, Any]]:
    """Return one row an attack: the request, the wrapper, each side's reply and whether it gave in."""
    return [
        {
            "request": asked.must_refuse[each.item][-1].content,
            "wrapper": each.wrapper,
            "prompt": [turn.to_row() for turn in each.prompt],
        }
        | {
            key: value
            for side, graded in sides.items()
            for key, value in (
                (side, graded.attack_replies[i]),
                (f"{side}_violates", graded.attacks[i]),
            )
        }
        for i, each in enumerate(asked.attacked)
    ]


def _asr_row(
    before: AttackRates | None,
    after: AttackRates | None,
    pairs: tuple[list[float], list[float]],
    seed: int,
) -> dict[str, Any] | None:
    if before is None or after is None or not pairs[0]:
        return None
    difference = paired_difference_interval(*pairs, seed, shares=True)
    return {
        "before": before.to_row(),
        "after": after.to_row(),
        "difference": difference.to_row(),
    }


def read_measures(folder: Path) -> dict[str, Any]:
    """Return what ``write_measures`` wrote."""
    return json.loads((folder / MEASURES).read_text())


def task_means(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (task, mean before and after with the interval of the difference) of a report's model.

    The tasks are those of lm-evaluation-harness.
    """
    kept, end = model["retention"], f"_{BEFORE}"
    names = [key.removesuffix(end) for key in kept if key.startswith(LM_EVAL) and key.endswith(end)]
    return [
        (
            name.removeprefix(LM_EVAL),
            f"{kept[f'{name}_{BEFORE}']:.3f} -> {kept[f'{name}_{AFTER}']:.3f}"
            + change(model, name, 1, ".3f"),
        )
        for name in names
    ]


def change(model: Mapping[str, Any], name: str, scale: float, form: str) -> str:
    """Return the 95% interval of a measure's paired difference as " (+0.1 [-0.2, 0.4])", or ""."""
    found = (model.get("changes") or {}).get(name)  # none in measures of an earlier version
    if found is None:
        return ""
    value, low, high = (scale * found[key] for key in ("value", "ci_low", "ci_high"))
    return f" ({value:+{form}} [{low:{form}}, {high:{form}}])"
