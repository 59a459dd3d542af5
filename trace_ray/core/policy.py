"""A policy: its clauses, digests and the checks that a policy file has to pass."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, ValidationError

from trace_ray.core.checks import Checks, PolicyPart, PolicyRules, When
from trace_ray.errors import ConfigError, problems
from trace_ray.types import Label, Message, Prompt, content_digest

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


def _iso_date(value: object) -> object:
    if isinstance(value, datetime.datetime) or not isinstance(value, str | datetime.date):
        raise ValueError("must be a date, written as 2026-12-01")
    if isinstance(value, datetime.date):
        return value
    try:
        return datetime.date.fromisoformat(value)
    except ValueError:
        raise ValueError("must be a date, written as 2026-12-01") from None


class Tier(StrEnum):
    """How grave a violation is, gravest first."""

    CRITICAL = "critical"
    HIGH = "high"
    STANDARD = "standard"
    REDUCED = "reduced"

    @property
    def rank(self) -> int:
        """0 for the gravest."""
        return list(Tier).index(self)


class Example(PolicyPart):
    """A labelled exchange: it belongs to a clause and helps to fit the judge."""

    prompt: Text
    response: Text
    verdict: Literal[Label.COMPLIES, Label.VIOLATES]

    def as_prompt(self) -> Prompt:
        """Return the prompt as a conversation of one user turn."""
        return (Message("user", self.prompt),)


class PolicyTest(Example):
    """A named exchange whose verdict under the whole policy is known."""

    name: Text


class Clause(PolicyPart):
    """One rule of a policy."""

    id: Name
    tier: Tier = Tier.STANDARD
    text: Text
    """What the judge reads."""
    exceptions: tuple[str, ...] = ()
    """Contexts in which the clause does not apply, or clauses that go before it where they do."""
    checks: Checks | None = None
    """The machine-checkable part of the clause; absent = only a model can judge it."""
    examples: tuple[Example, ...] = ()

    @cached_property
    def digest(self) -> str:
        """Content id of the clause (64 hex digits), whatever the order of keys."""
        return content_digest(_content(self))


class Policy(PolicyPart):
    """What an assistant's replies must keep to."""

    id: Name
    version: Name
    supersedes: Name | None = None
    """Version that this one replaces."""
    effective_from: Annotated[datetime.date, BeforeValidator(_iso_date)] | None = None
    clauses: tuple[Clause, ...] = Field(min_length=1)
    contexts: dict[Name, When] = Field(default_factory=dict)
    """Named situations that clauses list in ``exceptions``."""
    tests: tuple[PolicyTest, ...] = ()

    @cached_property
    def digest(self) -> str:
        """Content id (64 hex digits) of all that can change a verdict.

        That is id, version, clauses (with their order and examples) and contexts; not dates,
        ``supersedes`` or tests.
        """
        content = _content(self)
        return content_digest({key: content.get(key) for key in _VERDICT_KEYS})

    @cached_property
    def rules(self) -> PolicyRules:
        """The clauses' checks, ready to judge."""
        return PolicyRules(self)

    def clause_key(self, clause_id: str) -> str:
        """Content id (64 hex digits) of all that can change a verdict on one clause alone.

        That is its id, text and checks, and what its exceptions stand for; not its tier (the tiers
        are weighed after the judging), its examples or anything else in the policy.
        """
        clause = self.clause(clause_id)
        content = _content(clause)
        return content_digest(
            [
                {key: content.get(key) for key in ("id", "text", "checks")},
                self._exceptions(clause),
            ]
        )

    def _exceptions(self, clause: Clause) -> list[dict[str, Any]]:
        """Return what a clause's exceptions stand for, and theirs."""
        found = []
        for name in clause.exceptions:
            if name in self.contexts:
                found.append(_content(self.contexts[name]))
                continue
            other = self.clause(name)
            content = _content(other)
            own = {"exceptions": self._exceptions(other)} if other.exceptions else {}
            found.append({key: content.get(key) for key in ("text", "checks")} | own)
        return found

    def clause(self, clause_id: str) -> Clause:
        """Return the clause with this id.

        Raises:
            KeyError: the policy has no such clause.
        """
        for clause in self.clauses:
            if clause.id == clause_id:
                return clause
        raise KeyError(f"policy {self.id} {self.version} has no clause {clause_id!r}")


_VERDICT_KEYS = ("id", "version", "clauses", "contexts")


def parse_policy(raw: Mapping[str, Any], source: str) -> Policy:
    """Validate the content of a policy file.

    Args:
        raw: What the file holds, as read.
        source: Name of the file, for the messages.

    Raises:
        ConfigError: every problem at once, one line each: ``file: path: message``.
    """
    found: list[tuple[str, str]] = []
    policy: Policy | None = None
    try:
        policy = Policy.model_validate(dict(raw))
    except ValidationError as error:
        found += _field_problems(error)
    found += _name_problems(raw)
    if policy is not None and not found:
        found += _exception_problems(policy)
    if policy is None or found:
        raise _all_problems(source, found)
    return policy


def _content(part: PolicyPart) -> dict[str, Any]:
    """Canonical content: a default written out and a default left out are the same."""
    return part.model_dump(mode="json", exclude_defaults=True)


def _all_problems(source: str, found: list[tuple[str, str]]) -> ConfigError:
    return problems(source, list(dict.fromkeys(found)))


def _field_problems(error: ValidationError) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"])
        text = item["msg"].removeprefix("Value error, ")
        value = item["input"]
        if item["type"] == "too_short" and value:
            continue  # the items are there, each with its own problem
        if item["type"] == "extra_forbidden":
            text = "unknown key (check the spelling)"
        elif item["type"] == "missing":
            text = "is missing"
        elif item["type"] == "string_too_short":
            text = "is empty"
        elif item["type"] == "string_type" and isinstance(value, int | float):
            text = f"must be text: put it in quotes (got {value!r})"
        elif item["type"] == "string_pattern_mismatch":
            text = f"use letters, digits, '.', '_' and '-' only (got {value!r})"
        elif not isinstance(value, Mapping | list | tuple):
            text = f"{text} (got {value!r})"
        found.append((where, text))
    return found


def _name_problems(raw: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names that clash or name nothing, found in the raw file so that they show beside the rest."""
    clauses = _items(raw.get("clauses"))
    ids = [clause.get("id") if isinstance(clause, Mapping) else None for clause in clauses]
    contexts = raw.get("contexts")
    context_names = {str(name) for name in contexts} if isinstance(contexts, Mapping) else set()
    known = {name for name in ids if isinstance(name, str)} | context_names
    found: list[tuple[str, str]] = []
    for index, clause_id in enumerate(ids):
        where = f"clauses.{index}.id"
        if isinstance(clause_id, str) and clause_id in ids[:index]:
            first = ids.index(clause_id)
            found.append((where, f"duplicate id {clause_id!r} (first used by clauses.{first})"))
        if isinstance(clause_id, str) and clause_id in context_names:
            found.append((where, f"{clause_id!r} is the name of a context too: rename one"))
    for index, clause in enumerate(clauses):
        exceptions = clause.get("exceptions") if isinstance(clause, Mapping) else None
        for position, name in enumerate(_items(exceptions)):
            where = f"clauses.{index}.exceptions.{position}"
            if name == ids[index]:
                found.append((where, f"clause {name!r} can't be its own exception"))
            elif isinstance(name, str) and name not in known:
                found.append((where, f"{name!r} names no clause and no entry of 'contexts'"))
    tests = [test.get("name") for test in _items(raw.get("tests")) if isinstance(test, Mapping)]
    for name, count in Counter(name for name in tests if isinstance(name, str)).items():
        if count > 1:
            found.append(("tests", f"{count} tests are named {name!r}"))
    version = raw.get("version")
    if version is not None and version == raw.get("supersedes"):
        found.append(("supersedes", f"is this policy's own version {version!r}"))
    return found


def _exception_problems(policy: Policy) -> list[tuple[str, str]]:
    """Exceptions between clauses that would switch a clause off without saying so."""
    by_id = {clause.id: clause for clause in policy.clauses}
    found: list[tuple[str, str]] = []
    for index, clause in enumerate(policy.clauses):
        for position, name in enumerate(clause.exceptions):
            where, other = f"clauses.{index}.exceptions.{position}", by_id.get(name)
            if other is None:
                continue
            if clause.id in other.exceptions:
                found.append((where, f"{clause.id!r} and {name!r} are exceptions of each other"))
            elif _leads_back(other, clause.id, by_id):
                found.append(
                    (where, f"by way of {name!r}, {clause.id!r} is an exception of itself")
                )
            elif other.checks is not None and other.checks.when is None:
                found.append(
                    (where, f"{name!r} applies to every reply, so {clause.id!r} never would")
                )
    return found


def _leads_back(start: Clause, target: str, by_id: Mapping[str, Clause]) -> bool:
    """Return whether exceptions lead from ``start`` to ``target``."""
    seen, ahead = set[str](), list(start.exceptions)
    while ahead:
        name = ahead.pop()
        if name == target:
            return True
        if name not in seen and name in by_id:
            seen.add(name)
            ahead += by_id[name].exceptions
    return False


def _items(value: object) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()
