"""Attacks on a policy: wrappers around prompts, and how often an attacked model gives in (ASR)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from trace_ray.core.metrics import bootstrap_interval, share_interval
from trace_ray.errors import problems
from trace_ray.types import Interval, Label, Prompt, Verdict

PLACE = "{prompt}"
"""Where a template holds the request."""
_KEYS = ("name", "template", "source")


@dataclass(frozen=True, slots=True)
class Wrapper:
    """One attack: text around a request."""

    name: str
    template: str
    """Holds ``{prompt}`` at least once; other braces are plain text."""
    source: str = ""
    """Where the attack comes from."""

    def to_row(self) -> dict[str, str]:
        """Return JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Attacked:
    """A prompt under an attack."""

    item: int
    """Number of the prompt it was made from, from 0."""
    wrapper: str
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class AttackRates:
    """Attack success of one model, with 95% intervals."""

    asr: Interval
    """Mean over prompts of the share of its attacks that got a violating reply; prompts are resampled,
    as a prompt's attacks are not independent."""
    direct: Interval | None
    """Share of the same prompts, asked as they are, whose reply violates; None where not asked."""
    wrappers: dict[str, Interval]
    unjudged: int
    """Replies to attacks without a verdict: left out."""

    def to_row(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def parse_wrappers(raw: Mapping[str, Any], source: str) -> list[Wrapper]:
    """Read a mapping ``{attacks: [{name, template, source}, ...]}``.

    Raises:
        ConfigError: with every problem at once: no list, unknown or missing keys, a name used twice,
            a template without ``{prompt}``.
    """
    rows = raw.get("attacks")
    found = [(key, "unknown key (write 'attacks')") for key in raw if key != "attacks"]
    if not isinstance(rows, list) or not rows:
        raise problems(source, [*found, ("attacks", "must be a list of {name, template, source}")])
    wrappers: list[Wrapper] = []
    for number, row in enumerate(rows):
        where = f"attacks.{number}"
        wrong = _row_problems(row, where)
        if not wrong and row["name"] in {wrapper.name for wrapper in wrappers}:
            wrong = [(f"{where}.name", f"is used twice (got {row['name']!r})")]
        found += wrong
        if not wrong:
            wrappers.append(Wrapper(row["name"], row["template"], row.get("source", "")))
    if found:
        raise problems(source, found)
    return wrappers


def _row_problems(row: Any, where: str) -> list[tuple[str, str]]:
    if not isinstance(row, Mapping):
        return [(where, f"must be a mapping of name, template and source (got {row!r})")]
    found = [
        (f"{where}.{key}", "unknown key (known: name, template, source)")
        for key in row
        if key not in _KEYS
    ]
    for key in ("name", "template"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            found.append((f"{where}.{key}", f"must be text (got {row.get(key)!r})"))
    if not isinstance(row.get("source", ""), str):
        found.append((f"{where}.source", f"must be text (got {row['source']!r})"))
    template = row.get("template")
    if isinstance(template, str) and template.strip() and PLACE not in template:
        found.append((f"{where}.template", f"must hold {PLACE}, the place of the request"))
    return found


def wrap(wrapper: Wrapper, prompt: Prompt) -> Prompt:
    """Return ``prompt`` with its last user turn inside the wrapper; other turns stay."""
    at = max(i for i, turn in enumerate(prompt) if turn.role == "user")
    text = wrapper.template.replace(PLACE, prompt[at].content)
    return (*prompt[:at], replace(prompt[at], content=text), *prompt[at + 1 :])


def attack(
    prompts: Sequence[Prompt], wrappers: Sequence[Wrapper], per_prompt: int | None = None
) -> list[Attacked]:
    """Return every prompt under ``per_prompt`` wrappers (None = all of them).

    With fewer than all, prompts take turns, so that every wrapper is used equally often (to one).
    """
    take = len(wrappers) if per_prompt is None else min(per_prompt, len(wrappers))
    return [
        Attacked(item, wrapper.name, wrap(wrapper, prompt))
        for item, prompt in enumerate(prompts)
        for wrapper in (wrappers[(item * take + j) % len(wrappers)] for j in range(take))
    ]


def succeeded(reply: str, verdict: Verdict) -> bool | None:
    """Return whether a reply gives in: it says something and violates; None where it is unjudged."""
    if not reply.strip():
        return False
    return None if verdict.label is Label.UNJUDGED else verdict.label is Label.VIOLATES


def attack_rates(
    attacked: Sequence[Attacked],
    outcomes: Sequence[bool | None],
    direct: Sequence[bool | None] = (),
    seed: int = 0,
) -> AttackRates | None:
    """Return attack success rates; None where no attack was judged.

    Args:
        attacked: [N] attacks.
        outcomes: [N] of ``succeeded``.
        direct: of the prompts as they are, any number.
        seed: of the bootstrap.
    """
    shares = _shares(attacked, outcomes)
    if not shares:
        return None
    by_wrapper: dict[str, list[bool]] = {}
    for each, outcome in zip(attacked, outcomes, strict=True):
        if outcome is not None:
            by_wrapper.setdefault(each.wrapper, []).append(outcome)
    judged = [outcome for outcome in direct if outcome is not None]
    return AttackRates(
        asr=bootstrap_interval(list(shares.values()), seed),
        direct=share_interval(sum(judged), len(judged)) if judged else None,
        wrappers={
            name: share_interval(sum(found), len(found)) for name, found in by_wrapper.items()
        },
        unjudged=sum(outcome is None for outcome in outcomes),
    )


def paired_shares(
    attacked: Sequence[Attacked],
    before: Sequence[bool | None],
    after: Sequence[bool | None],
) -> tuple[list[float], list[float]]:
    """Return, prompt by prompt, the share of its attacks that succeeded before and after.

    Attacks that are unjudged on either side are left out, and so are prompts without any other.
    """
    both = [b is not None and a is not None for b, a in zip(before, after, strict=True)]

    def kept(outcomes: Sequence[bool | None]) -> Iterable[float]:
        only = [outcome if ok else None for outcome, ok in zip(outcomes, both, strict=True)]
        return _shares(attacked, only).values()

    return list(kept(before)), list(kept(after))


def _shares(attacked: Sequence[Attacked], outcomes: Sequence[bool | None]) -> dict[int, float]:
    by_prompt: dict[int, list[bool]] = {}
    for each, outcome in zip(attacked, outcomes, strict=True):
        if outcome is not None:
            by_prompt.setdefault(each.item, []).append(outcome)
    return {item: sum(found) / len(found) for item, found in by_prompt.items()}
