"""Frozen records that cross a boundary: a process, a file or a package (standard library only).

Every record that is written to parquet or JSON has ``to_row`` (plain dicts, lists and scalars) and
``from_row``, its inverse. Text fields hold Unicode text, probabilities are floats in [0, 1].
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Literal, get_args

Role = Literal["system", "user", "assistant"]
ROLES: tuple[str, ...] = get_args(Role)


class Label(StrEnum):
    """What a judge says of one response under one policy."""

    COMPLIES = "complies"
    VIOLATES = "violates"
    UNJUDGED = "unjudged"


class Category(StrEnum):
    """What a preference pair becomes under the new policy (method: stage 1)."""

    INVERT = "invert"
    """The old loser is right now: prefer ``rejected`` over ``chosen``."""
    PUNISH = "punish"
    """Both responses are wrong now: suppress both."""
    RETAIN = "retain"
    """The old winner is still right: hold the model where it is."""
    UNJUDGED = "unjudged"
    """A verdict that was needed is missing: the row is kept, counted and not trained on."""


def content_digest(value: Any) -> str:
    """Return the sha256 (64 hex digits) of ``value`` as canonical JSON; keys in any order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str

    def to_row(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content}


Prompt = tuple[Message, ...]


def prompt_from_rows(rows: Sequence[Mapping[str, str]]) -> Prompt:
    """Inverse of ``[message.to_row() for message in prompt]``."""
    return tuple(Message(row["role"], row["content"]) for row in rows)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One preference pair in its ORIGINAL order: ``chosen`` was preferred under the old policy."""

    prompt: Prompt
    chosen: str
    rejected: str
    source: str = ""
    """Where the row came from (``file:line``); not part of its identity."""

    @property
    def pair_id(self) -> str:
        """Content id: the first 16 hex digits of the digest of prompt, chosen and rejected."""
        prompt = [message.to_row() for message in self.prompt]
        return content_digest([prompt, self.chosen, self.rejected])[:16]

    def to_row(self) -> dict[str, Any]:
        return {
            "pair_id": self.pair_id,
            "prompt": [message.to_row() for message in self.prompt],
            "chosen": self.chosen,
            "rejected": self.rejected,
            "source": self.source,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> PreferencePair:
        prompt = prompt_from_rows(row["prompt"])
        return cls(prompt, row["chosen"], row["rejected"], row.get("source") or "")


def response_id(prompt: Prompt, response: str) -> str:
    """Content id (16 hex digits) of one (prompt, response): duplicates are judged once."""
    return content_digest([[message.to_row() for message in prompt], response])[:16]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's word on one (prompt, response) under one policy."""

    label: Label
    p_violate: float | None
    """Probability that the response violates the policy; an unjudged verdict that has one was left to
    a person (the judge abstains)."""
    judge_id: str
    clause: str | None = None
    """Id of the (first) clause the judge saw violated, where it says."""
    reason: str = ""
    """Why the response is unjudged, or what a rule matched."""
    raw: str = ""
    """The judge's unparsed answer, kept for audit."""
    provenance: Literal["model", "rules", "human"] = "model"

    @classmethod
    def unjudged(cls, judge_id: str, reason: str, raw: str = "") -> Verdict:
        """A verdict that is missing, with the reason; never a default label."""
        return cls(Label.UNJUDGED, None, judge_id, reason=reason, raw=raw)

    def to_row(self) -> dict[str, Any]:
        return asdict(self) | {"label": str(self.label)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Verdict:
        return cls(**{**row, "label": Label(row["label"])})


@dataclass(frozen=True, slots=True)
class TriagedPair:
    """A preference pair with its category under the new policy."""

    pair: PreferencePair
    category: Category
    verdict_chosen: Verdict
    verdict_rejected: Verdict | None = None
    """None where it was not needed: ``chosen`` complies (or is unjudged)."""

    @property
    def pair_id(self) -> str:
        return self.pair.pair_id

    def to_row(self) -> dict[str, Any]:
        return self.pair.to_row() | {
            "category": str(self.category),
            "verdict_chosen": self.verdict_chosen.to_row(),
            "verdict_rejected": None
            if self.verdict_rejected is None
            else self.verdict_rejected.to_row(),
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> TriagedPair:
        rejected = row["verdict_rejected"]
        return cls(
            PreferencePair.from_row(row),
            Category(row["category"]),
            Verdict.from_row(row["verdict_chosen"]),
            None if rejected is None else Verdict.from_row(rejected),
        )


@dataclass(frozen=True, slots=True)
class ImpactScore:
    """One conflict's impact on one model: the raw score and the training weight made from it."""

    pair_id: str
    raw: float
    """<g_J, g> / gamma, before the clamp (Algorithm 1)."""
    weight: float

    def to_row(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> ImpactScore:
        return cls(row["pair_id"], row["raw"], row["weight"])


@dataclass(frozen=True, slots=True)
class LabelledResponse:
    """A response with its true verdict: what a judge is fitted on and measured with."""

    prompt: Prompt
    response: str
    violates: bool
    group: str = ""
    """Rows of one group (a topic, a dialogue) never stand on both sides of a held-out split."""
    clause: str = ""
    """Id of the clause that the label is about, where it names one."""

    def to_row(self) -> dict[str, Any]:
        return {
            "prompt": [message.to_row() for message in self.prompt],
            "response": self.response,
            "violates": self.violates,
            "group": self.group,
            "clause": self.clause,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> LabelledResponse:
        return cls(
            prompt_from_rows(row["prompt"]),
            row["response"],
            bool(row["violates"]),
            row.get("group") or "",
            row.get("clause") or "",
        )


@dataclass(frozen=True, slots=True)
class EvalPrompt:
    """A held-out prompt whose answers are measured; ``bin`` is the category its pairs fall in."""

    prompt: Prompt
    bin: Category
    must_mention: tuple[str, ...] = ()
    """On-topic check: a right answer contains at least one of these (case-insensitive); empty = any."""

    def to_row(self) -> dict[str, Any]:
        return {
            "prompt": [message.to_row() for message in self.prompt],
            "bin": str(self.bin),
            "must_mention": list(self.must_mention),
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> EvalPrompt:
        mention = tuple(row.get("must_mention") or ())
        return cls(prompt_from_rows(row["prompt"]), Category(row["bin"]), mention)


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence interval over ``n`` items: at 95%, unless its maker says otherwise
    (the gate's are at 1 - 2 alpha, the sequential test's hold at any time).
    """

    value: float
    ci_low: float
    ci_high: float
    n: int

    def to_row(self) -> dict[str, Any]:
        return asdict(self)
