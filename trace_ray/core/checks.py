"""Machine-checkable rules of a policy's clauses, and the verdict they give on a reply.

How patterns and phrases are looked for in a text is ``search``'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from trace_ray.core.search import find, found_in_prompt, has_phrase, plain
from trace_ray.types import Label, Prompt, Verdict

if TYPE_CHECKING:
    from trace_ray.core.policy import Clause, Policy

FORM = 4
"""Raised where the same checks judge otherwise than before: older verdicts are not used for them."""
MAX_CHARS = 100_000
"""A longer prompt or reply is unjudged: patterns are searched in texts of bounded length only."""


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error}") from None
    if not pattern:
        raise ValueError("is empty and would match anything")
    return pattern


def _not_blank(phrase: str) -> str:
    if not phrase.strip():
        raise ValueError("is empty and would match anything")
    return phrase


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


Regex = Annotated[str, AfterValidator(_compiles)]
Regexes = Annotated[tuple[Regex, ...], BeforeValidator(_one_or_many), Field(min_length=1)]
Phrases = Annotated[
    tuple[Annotated[str, AfterValidator(_not_blank)], ...],
    BeforeValidator(_one_or_many),
    Field(min_length=1),
]


class PolicyPart(BaseModel):
    """Base of every part of a policy: frozen, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class When(PolicyPart):
    """A condition on one exchange; everything given must match."""

    regex: Regex | None = None
    """Found in the reply."""
    prompt_regex: Regex | None = None
    """Found in the prompt's last user turn."""

    @model_validator(mode="after")
    def _has_a_condition(self) -> When:
        if self.regex is None and self.prompt_regex is None:
            raise ValueError("needs 'regex' (the reply) or 'prompt_regex' (the last user turn)")
        return self

    def matches(self, prompt: str, response: str) -> bool:
        """Return whether the exchange meets the condition (both texts already plain)."""
        return (self.regex is None or find(self.regex, response) is not None) and (
            self.prompt_regex is None or found_in_prompt(self.prompt_regex, prompt)
        )


class PhraseSet(PolicyPart):
    """Phrases of which at least one (``any``) or every one (``all``) is meant."""

    any: Phrases | None = None
    all: Phrases | None = None

    @model_validator(mode="after")
    def _has_phrases(self) -> PhraseSet:
        if self.any is None and self.all is None:
            raise ValueError("needs 'any' or 'all', a list of phrases")
        return self


class Checks(PolicyPart):
    """What a rule can tell about one reply; each key given must hold where ``when`` matches."""

    when: When | None = None
    """The checks apply only here; absent = to every reply."""
    must_include: PhraseSet | None = None
    """``any``: one of the phrases at least; ``all``: each of them."""
    must_not_include: PhraseSet | None = None
    """``any``: none of the phrases; ``all``: not all of them together."""
    must_match: Regexes = Field((), validate_default=False)
    """A pattern, or several that must each be found."""
    must_not_match: Regexes = Field((), validate_default=False)
    """A pattern, or several of which none may be found."""
    min_words: int | None = Field(None, ge=1)
    """Fewest words (runs of non-space)."""
    max_words: int | None = Field(None, ge=1)
    """Most words (runs of non-space)."""

    @model_validator(mode="after")
    def _checks_something(self) -> Checks:
        if not self.model_fields_set - {"when"}:
            raise ValueError(
                "checks nothing: add must_include, must_not_include, must_match, must_not_match, "
                "min_words or max_words"
            )
        low, high = self.min_words, self.max_words
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_words {low} is more than max_words {high}: no reply can comply")
        return self

    def applies(self, prompt: str, response: str) -> bool:
        """Return whether ``when`` lets the checks judge this exchange (texts already plain)."""
        return self.when is None or self.when.matches(prompt, response)

    def failure(self, response: str) -> str | None:
        """Return why ``response`` (already plain) fails, or None when every check holds."""
        return (
            _included(self.must_include, response)
            or _not_included(self.must_not_include, response)
            or _matched(self.must_match, self.must_not_match, response)
            or _word_count(self.min_words, self.max_words, response)
        )


class PolicyRules:
    """A policy's checks, prepared once (``Policy.rules``) for many exchanges."""

    def __init__(self, policy: Policy):
        by_id = {clause.id: clause for clause in policy.clauses}
        self.judge_id = f"rules@{policy.digest[:8]}"
        self.clauses = sorted(policy.clauses, key=lambda clause: clause.tier.rank)
        """In tier order, then file order."""
        self.checked = [clause for clause in self.clauses if clause.checks is not None]
        self.contexts = {
            clause.id: [
                policy.contexts[name] for name in clause.exceptions if name in policy.contexts
            ]
            for clause in policy.clauses
        }
        self.overriding = {
            clause.id: [
                by_id[name]
                for name in clause.exceptions
                if name in by_id and by_id[name].checks is not None
            ]
            for clause in policy.clauses
        }
        skipped = len(self.clauses) - len(self.checked)
        self.caveat = f"clauses without checks, not judged: {skipped}" if skipped else ""
        self.complies = Verdict(
            Label.COMPLIES, 0.0, self.judge_id, reason=self.caveat, provenance="rules"
        )

    def verdict(self, prompt: Prompt, response: str) -> Verdict:
        """Judge one reply by the whole policy: see ``evaluate_policy``."""
        if not self.checked:
            return Verdict.unjudged(self.judge_id, "no clause of the policy has checks")
        texts = self._plain_texts(prompt, response)
        if texts is None:
            return self._too_long()
        found = next(self._violations(*texts), None)
        if found:
            return self._violates(*found)
        return self.complies

    def clause_verdict(self, clause: Clause, prompt: Prompt, response: str) -> Verdict:
        """Judge one reply by one clause alone; where the clause doesn't apply, the reply complies."""
        if clause.checks is None:
            why = f"clause {clause.id} has no checks: write some, or let a model judge it (kind cascade)"
            return Verdict.unjudged(self.judge_id, why)
        texts = self._plain_texts(prompt, response)
        if texts is None:
            return self._too_long()
        why = clause.checks.failure(texts[1]) if self._applies(clause, *texts) else None
        if why is not None:
            return self._violates(clause, why)
        return Verdict(Label.COMPLIES, 0.0, self.judge_id, clause=clause.id, provenance="rules")

    def violated(self, prompt: Prompt, response: str) -> tuple[str, ...]:
        """Return the ids of every clause whose checks ``response`` fails, in tier order."""
        texts = plain(_last_user_turn(prompt)), plain(response)
        return tuple(clause.id for clause, _ in self._violations(*texts))

    def applicable(self, prompt: Prompt, response: str) -> list[Clause]:
        """Return the clauses that apply to one exchange, in tier order.

        As far as a machine can tell: a clause is left out where its ``checks.when`` doesn't match,
        or where one of its exceptions holds. In a text longer than ``MAX_CHARS`` no pattern is
        searched, so every clause applies.
        """
        texts = self._plain_texts(prompt, response)
        if texts is None:
            return list(self.clauses)
        return [clause for clause in self.clauses if self._applies(clause, *texts)]

    def _plain_texts(self, prompt: Prompt, response: str) -> tuple[str, str] | None:
        asked = _last_user_turn(prompt)
        if max(len(response), len(asked)) > MAX_CHARS:
            return None
        return plain(asked), plain(response)

    def _violations(self, asked: str, reply: str) -> Iterator[tuple[Clause, str]]:
        for clause in self.checked:
            checks = clause.checks
            if checks is None or not checks.applies(asked, reply):
                continue
            why = checks.failure(reply)
            if why is not None and not self._is_excepted(clause, asked, reply):
                yield clause, why

    def _applies(self, clause: Clause, asked: str, reply: str) -> bool:
        if clause.checks is not None and not clause.checks.applies(asked, reply):
            return False
        return not self._is_excepted(clause, asked, reply)

    def _is_excepted(self, clause: Clause, asked: str, reply: str) -> bool:
        """An exception holds where its context matches, or where the clause it names applies."""
        return any(context.matches(asked, reply) for context in self.contexts[clause.id]) or any(
            self._applies(other, asked, reply) for other in self.overriding[clause.id]
        )

    def _violates(self, clause: Clause, why: str) -> Verdict:
        return Verdict(
            Label.VIOLATES, 1.0, self.judge_id, clause=clause.id, reason=why, provenance="rules"
        )

    def _too_long(self) -> Verdict:
        return Verdict.unjudged(self.judge_id, f"text of more than {MAX_CHARS} characters")


def evaluate_policy(policy: Policy, prompt: Prompt, response: str) -> Verdict:
    """Judge one reply by the clauses' ``checks`` alone.

    Args:
        policy: Clauses without checks are not judged; the reason says how many there are.
        prompt: The conversation; ``prompt_regex`` reads its last user turn.
        response: The reply.

    Returns:
        ``violates`` with the first violated clause in tier order (then file order), ``complies``,
        or ``unjudged`` where no clause has checks or a text is longer than ``MAX_CHARS``.
    """
    return policy.rules.verdict(prompt, response)


def violated_clauses(policy: Policy, prompt: Prompt, response: str) -> tuple[str, ...]:
    """Return the ids of every clause whose checks ``response`` fails, in tier order."""
    return policy.rules.violated(prompt, response)


def rule_disagreements(policy: Policy) -> tuple[str, ...]:
    """Return one line per labelled example or test that the policy's own checks judge otherwise.

    Clauses without checks leave their examples alone: only a model can judge them. An example is
    held against its own clause, a test against the whole policy.
    """
    found: list[str] = []
    for clause in policy.clauses:
        for index, example in enumerate(clause.examples if clause.checks else ()):
            violates = clause.id in violated_clauses(policy, example.as_prompt(), example.response)
            if violates != (example.verdict == Label.VIOLATES):
                says = "violates" if violates else "complies"
                found.append(
                    f"clauses.{clause.id}.examples.{index}: labelled {example.verdict}, "
                    f"but by the clause's checks it {says}"
                )
    for test in policy.tests:
        verdict = evaluate_policy(policy, test.as_prompt(), test.response)
        if verdict.label not in (test.verdict, Label.UNJUDGED):
            because = f" ({verdict.clause}: {verdict.reason})" if verdict.clause else ""
            found.append(
                f"tests.{test.name}: expected {test.verdict}, "
                f"but by the policy's checks it {verdict.label}{because}"
            )
    return tuple(found)


def _last_user_turn(prompt: Prompt) -> str:
    """Return what the user said last: turns in a row are one, and blank ones are none."""
    said: list[str] = []
    for turn in reversed(prompt):
        if turn.role == "user":
            said += [turn.content] if turn.content.strip() else []
        elif said:
            break
    return "\n".join(reversed(said))


def _included(phrases: PhraseSet | None, text: str) -> str | None:
    if phrases is None:
        return None
    if phrases.any and not any(has_phrase(phrase, text) for phrase in phrases.any):
        return f"includes none of {_quoted(phrases.any)}"
    missing = [phrase for phrase in phrases.all or () if not has_phrase(phrase, text)]
    return f"doesn't include {_quoted(missing)}" if missing else None


def _not_included(phrases: PhraseSet | None, text: str) -> str | None:
    if phrases is None:
        return None
    present = [phrase for phrase in phrases.any or () if has_phrase(phrase, text)]
    if present:
        return f"includes {_quoted(present)}"
    if phrases.all and all(has_phrase(phrase, text) for phrase in phrases.all):
        return f"includes all of {_quoted(phrases.all)}"
    return None


def _matched(must: tuple[str, ...], must_not: tuple[str, ...], text: str) -> str | None:
    for pattern in must_not:
        match = find(pattern, text)
        if match is not None:
            return f"{_short(match.group())!r} is matched by must_not_match"
    for pattern in must:
        if find(pattern, text) is None:
            return f"nothing is matched by must_match {_short(pattern)!r}"
    return None


def _word_count(low: int | None, high: int | None, text: str) -> str | None:
    # No more words than a limit needs: texts may be long.
    words = len(text.split(maxsplit=-1 if low is None or high is not None else low))
    if low is not None and words < low:
        return f"{words} words, fewer than min_words {low}"
    if high is not None and words > high:
        return f"{words} words, more than max_words {high}"
    return None


def _quoted(phrases: tuple[str, ...] | list[str]) -> str:
    return _short(", ".join(repr(phrase) for phrase in phrases))


def _short(text: str, limit: int = 80) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
