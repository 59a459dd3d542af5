"""``trace-ray judge distil``: a small judge trained on labels or on a stronger judge's verdicts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trace_ray.config import JudgeConfig
from trace_ray.data.sources import read_labels
from trace_ray.errors import ConfigError, JudgeError
from trace_ray.models.adapters import adapter_sha256
from trace_ray.models.references import resolve_model
from trace_ray.rollout.calibrating import judge_of
from trace_ray.rollout.heldout import distinct_pairs
from trace_ray.rollout.judging import ask, distilled_as, prepared_judge, verdict_store
from trace_ray.rollout.plan import Inputs, read_inputs
from trace_ray.runtime.judge_card import JudgeCard, require_auc
from trace_ray.runtime.judges import Exchange, JudgeSpec, rule_judge
from trace_ray.runtime.progress import Reporter
from trace_ray.runtime.records import AdapterRecord, RegisteredVersion
from trace_ray.runtime.verdict_store import CLAUSES, HUMAN
from trace_ray.types import Label, LabelledResponse, Verdict, content_digest, response_id
from trace_ray.version import code_version

RULES = "rules"


@dataclass(frozen=True, slots=True)
class Distilled:
    """A judge adapter that was trained, measured and registered."""

    registered: RegisteredVersion
    card: JudgeCard
    """Measured on the held-out fifth of the labels."""
    n_labels: int
    n_left_out: int
    """Replies that the teacher gave no verdict on."""


def distil(
    config_path: str,
    labels: Path | None,
    teacher: str | None,
    *,
    name: str,
    alias: str,
    limit: int,
) -> Distilled:
    """Train a judge adapter on the config's judge model and register it.

    Args:
        config_path: fleet config; its ``judge`` section names the small model and how to fit it.
        labels: jsonl of labelled replies; None = ask the teacher.
        teacher: ``rules``, a fleet config whose judge is asked, or the name of a judge whose stored
            verdicts are used (``trace-ray verdicts stats`` lists them); people's answers go before it.
        name: of the registered model, after the registry's prefix.
        alias: set on the registered version.
        limit: replies of the config's data that the teacher labels, at most.

    Raises:
        ConfigError: not exactly one of labels and teacher, or no ``kind: vllm`` judge in the config.
        JudgeError: too few labels, or the trained judge is below ``judge.min_auc`` (not registered).
    """
    if (labels is None) == (teacher is None):
        raise ConfigError("name either --labels or --from-judge")
    inputs = read_inputs(config_path)
    config = inputs.config.judge
    if config is None or config.kind != "vllm":
        raise ConfigError(
            f"{config_path}: judge: distilling trains a model: use kind: vllm and name it in 'model'"
        )
    rows = read_labels(labels) if labels is not None else []
    left_out = 0
    if teacher is not None:
        rows, left_out = _taught(inputs, teacher, limit)
    student = config.model_copy(update={"adapter": "auto", "threshold": "calibrated"})
    fleet = inputs.config.model_copy(update={"judge": student})
    spec, card = prepared_judge(replace(inputs, config=fleet, labels=rows), Reporter(None, "judge"))
    require_auc(card, config.min_auc)
    registered = _register(inputs, spec, card, rows, name, alias, str(labels or teacher))
    return Distilled(registered, card, len(rows), left_out)


def _taught(inputs: Inputs, teacher: str, limit: int) -> tuple[list[LabelledResponse], int]:
    """Label the first replies of the config's data; return them, and how many got no verdict.

    Replies to one prompt are one group, so none stands on both sides of the held-out split.
    """
    data = inputs.config.data
    pairs = distinct_pairs(data.source, data.row_schema)
    replies = (
        Exchange(pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)
    )
    exchanges = list(dict.fromkeys(itertools.islice(replies, limit)))
    verdicts = _with_people(inputs, exchanges, _verdicts(inputs, teacher, exchanges))
    rows = [
        LabelledResponse(
            prompt=exchange.prompt,
            response=exchange.response,
            violates=verdict.label is Label.VIOLATES,
            group=content_digest([turn.to_row() for turn in exchange.prompt])[:16],
            clause=verdict.clause or "" if verdict.label is Label.VIOLATES else "",
        )
        for exchange, verdict in zip(exchanges, verdicts, strict=True)
        if verdict is not None and verdict.label is not Label.UNJUDGED
    ]
    if not rows:
        raise JudgeError(
            f"{teacher}: gives no verdict on any of {len(exchanges)} replies of {data.source}"
        )
    return rows, len(exchanges) - len(rows)


def _with_people(
    inputs: Inputs, exchanges: Sequence[Exchange], verdicts: Sequence[Verdict | None]
) -> list[Verdict | None]:
    """Return the verdicts, people's own in the place of the teacher's."""
    about = inputs.policy.digest
    people = verdict_store(inputs).load(HUMAN, about, [about])
    said = people.get(about, [response_id(each.prompt, each.response) for each in exchanges])
    return [ours or theirs for ours, theirs in zip(said, verdicts, strict=True)]


def _verdicts(
    inputs: Inputs, teacher: str, exchanges: Sequence[Exchange]
) -> Sequence[Verdict | None]:
    store = verdict_store(inputs)
    if teacher == RULES:
        return ask(rule_judge(inputs.policy), exchanges)
    if Path(teacher).is_file():
        return ask(judge_of(teacher, inputs.policy), exchanges, store)
    found = {row.judge_id: row.judge for row in store.stats() if row.about != CLAUSES}
    if teacher not in found:
        known = ", ".join([RULES, *sorted(found)])
        raise ConfigError(
            f"--from-judge {teacher}: no such config file, and no judge of that name has stored "
            f"verdicts on whole replies; there are {known}"
        )
    about = inputs.policy.digest
    stored = store.load(found[teacher], about, [about])
    return stored.get(about, [response_id(each.prompt, each.response) for each in exchanges])


def _register(
    inputs: Inputs,
    spec: JudgeSpec,
    card: JudgeCard,
    rows: Sequence[LabelledResponse],
    name: str,
    alias: str,
    learnt_from: str,
) -> RegisteredVersion:
    config, policy = spec.config, inputs.policy
    adapter = Path(str(spec.adapter_dir))
    sha256 = adapter_sha256(adapter)
    source = resolve_model(str(config.model), config.revision, inputs.store.models)
    measures = {key: value for key, value in card.to_row().items() if isinstance(value, float)}
    record = AdapterRecord(
        name=name,
        adapter_dir=adapter,
        adapter_id=f"{name}@{policy.version}-{sha256[:8]}",
        adapter_sha256=sha256,
        policy_id=policy.id,
        policy_version=policy.version,
        policy_digest=policy.digest,
        data_digest=content_digest([row.to_row() for row in rows]),
        base=str(config.model),
        base_revision=source.revision,
        base_digest=source.digest,
        parent_adapter="",
        objective=distilled_as(config),
        alias=alias,
        params={"learnt_from": learnt_from, "n_labels": len(rows)} | _fit_params(config),
        metrics=measures,
        made_from={"code_version": code_version()},
        card=json.dumps(card.to_row()),
    )
    return inputs.registry().register(record)


def _fit_params(config: JudgeConfig) -> dict[str, object]:
    return {f"fit.{key}": value for key, value in config.fit.model_dump().items()}
