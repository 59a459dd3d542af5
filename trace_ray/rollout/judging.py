"""From a config's judge section to a judge that has earned its place."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trace_ray import __version__
from trace_ray.config import JudgeConfig
from trace_ray.core.judge_prompt import FORM
from trace_ray.core.policy import Policy
from trace_ray.errors import ConfigError, JudgeError, ModelError
from trace_ray.models.references import ModelSource, resolve_model
from trace_ray.rollout.plan import Inputs
from trace_ray.runtime.cluster import run_alone
from trace_ray.runtime.fit_judge import fit_judge, measure_judge
from trace_ray.runtime.judge_card import JudgeCard, judge_card, require_auc, rules_card
from trace_ray.runtime.judges import Exchange, JudgeSpec, rule_judge
from trace_ray.runtime.needs import Needs
from trace_ray.runtime.progress import Reporter
from trace_ray.runtime.stored_judge import StoredJudge
from trace_ray.runtime.verdict_store import CLAUSES, HUMAN, VerdictStore
from trace_ray.types import LabelledResponse, Verdict, content_digest

_REGISTERED = "models:/"
_SHOWN = 10
"""Clause ids that a message names, at most."""


def verdict_store(inputs: Inputs) -> VerdictStore:
    """Return the verdict store of a config's storage."""
    return VerdictStore(str(Path(inputs.store.root, "verdicts")), inputs.store.bucket)


def people_said(inputs: Inputs) -> list[str]:
    """Return the digests of people's verdicts under the policy that the triage goes by; [] for none."""
    policy, judge, store = inputs.policy, inputs.config.judge, verdict_store(inputs)
    known = [store.load(HUMAN, policy.digest, [policy.digest])]
    if judge is not None and judge.granularity == "clause":
        subjects = [policy.clause_key(clause.id) for clause in policy.clauses]
        known.append(store.load(HUMAN, CLAUSES, subjects))
    return [each.digest for each in known if each]


def prepared_judge(inputs: Inputs, fleet: Reporter) -> tuple[JudgeSpec, JudgeCard]:
    """Return the config's judge, fitted where it asks for that, with what is known of it.

    Raises:
        ConfigError: the config has no judge.
        JudgeError: labels are missing or too few.
        ModelError: the judge's model or adapter can't be used.
    """
    if inputs.config.judge is None:
        raise ConfigError("the config has no 'judge' section")
    return _prepared(inputs, inputs.config.judge, inputs.labels, fleet)


def evaluation_judge(inputs: Inputs, fleet: Reporter) -> JudgeSpec | None:
    """Return the judge that measures, as good as ``evaluation.judge`` asks; None without evaluation.

    Raises:
        JudgeError: it isn't, or can't be built.
        ModelError: its model or adapter can't be used.
    """
    from trace_ray.data.sources import read_labels

    evaluation = inputs.config.evaluation
    if evaluation is None:
        return None
    config = evaluation.judge
    if config is None:
        return rule_judge(inputs.policy)
    labels = read_labels(Path(config.labels)) if config.labels else []
    try:
        spec, card = _prepared(inputs, config, labels, fleet)
        require_auc(card, config.min_auc)
    except JudgeError as error:
        raise JudgeError(f"evaluation.judge: {error}") from None
    return spec


def warn_of_unchecked(policy: Policy, config: JudgeConfig) -> None:
    """Tell, on stderr, of clauses that rules leave replies unjudged for."""
    if config.kind != "rules" or config.granularity != "clause":
        return
    unweighed = {tier for tier, n in config.tiers.items() if n == 0}
    clauses = [
        clause.id
        for clause in policy.clauses
        if clause.checks is None and clause.tier not in unweighed
    ]
    if clauses:
        print(
            f"warning: judge.kind: rules can't judge {_listed(clauses)}, without checks in policy "
            f"{policy.id} {policy.version}: with granularity clause, replies that they apply to are "
            "unjudged unless they violate another one. Write checks, use kind: cascade with a model "
            "after the rules, or granularity: policy, which leaves such clauses out",
            file=sys.stderr,
        )


def judged_clauses(policy: Policy, spec: JudgeSpec) -> list[str]:
    """Return the clauses on which only the judge's word says whether a reply keeps them."""
    if spec.config.granularity != "clause":
        return []
    return [clause.id for clause in policy.clauses if clause.checks is None]


def ask_measuring(inputs: Inputs, spec: JudgeSpec, exchanges: Sequence[Exchange]) -> list[Verdict]:
    """Return the measuring judge's verdicts; a judge that costs something keeps them in the store."""
    return ask(spec, exchanges, None if spec.kind == "rules" else verdict_store(inputs))


def _prepared(
    inputs: Inputs, config: JudgeConfig, labels: list[LabelledResponse], fleet: Reporter
) -> tuple[JudgeSpec, JudgeCard]:
    if config.kind == "vllm":
        return _prepared_vllm(inputs, config, labels, fleet)
    if config.kind == "rules":
        spec = rule_judge(inputs.policy, config)
        return spec, rules_card(spec, labels)
    # By clause, members are asked about clauses: one that is fitted has to learn those questions.
    asked = {"granularity": config.granularity, "tiers": config.tiers}
    members = tuple(
        _member(inputs, member.model_copy(update=asked), labels, fleet) for member in config.judges
    )
    spec = _spec(config, inputs.policy, members)
    spec = dataclasses.replace(spec, needs=Needs.of(inputs.store))
    if not labels:
        threshold = 0.5 if config.threshold == "calibrated" else config.threshold
        card = JudgeCard(spec.judge_id, None, None, threshold, 0, 0, 0)
        return dataclasses.replace(spec, threshold=threshold), card
    key = _stage_key(inputs, config, labels) | {"judge": spec.digest}

    def work(out: Path) -> None:
        fleet("measuring the judge")
        _run_judge(spec, measure_judge, spec, labels, out, out=out)

    stage = inputs.store.stage("judge", key, work)
    card = judge_card(spec, labels, stage.path)
    return dataclasses.replace(spec, threshold=card.threshold), card


def _member(
    inputs: Inputs, config: JudgeConfig, labels: list[LabelledResponse], fleet: Reporter
) -> JudgeSpec:
    """A member of a cascade or quorum; without labels of its own it gets the group's."""
    from trace_ray.data.sources import read_labels

    own = read_labels(Path(config.labels)) if config.labels else labels
    return _prepared(inputs, config, own, fleet)[0]


def _spec(config: JudgeConfig, policy: Policy, members: Sequence[JudgeSpec]) -> JudgeSpec:
    """A judge that needs no fitting: an endpoint, a script, or a group of others."""
    asks: dict[str, Any] = {"kind": config.kind, "model": config.model}
    if config.kind == "openai":
        server = config.openai.base_url or os.environ.get("OPENAI_BASE_URL")
        kept = config.openai.model_dump(include={"logprobs", "max_answer_tokens"})
        asks["openai"] = kept | {"base_url": server, "form": FORM}
    if config.kind == "scripted":
        asks["script"] = [line.model_dump() for line in config.script]
    if members:
        # A group's label is made of its members' labels, so what they decide by counts too.
        asks["agree"] = config.n_agree
        asks["members"] = [[m.digest, m.threshold, m.band] for m in members]
    digest = content_digest(asks)
    name = Path(config.model).name if config.model else config.kind
    return JudgeSpec(config, policy, f"{name}@{digest[:8]}", digest, members=tuple(members))


def _prepared_vllm(
    inputs: Inputs, config: JudgeConfig, labels: list[LabelledResponse], fleet: Reporter
) -> tuple[JudgeSpec, JudgeCard]:
    if not labels and config.adapter == "auto":
        raise JudgeError(
            "judge.adapter: 'auto' fits the judge on labelled responses: name a file in judge.labels"
        )
    if config.adapter == "auto" and config.granularity == "clause":
        _require_known_clauses(inputs.policy, labels)
    source = resolve_model(str(config.model), config.revision, inputs.store.models)
    given, known = config.adapter_folder, None
    if config.adapter and config.adapter.startswith(_REGISTERED):
        given, known = _registered(inputs, config, source)
    given = given and str(inputs.store.shared(given))
    if not labels and known is None:
        raise JudgeError(
            "judge.labels: a vllm judge is measured on labels before it may triage (one that was "
            "distilled for this very policy brings its measures along)"
        )
    key = _stage_key(inputs, config, labels)
    key |= {"model": source.digest, "tokenizer": source.tokenizer}
    if config.adapter != "auto":
        key["judge"] = _fixed(given, config, source)
    digest = key["judge"] if "judge" in key else content_digest(key)
    spec = JudgeSpec(
        config=config,
        policy=inputs.policy,
        judge_id=f"{Path(source.path).name}@{digest[:8]}",
        digest=digest,
        model_dir=str(source.path),
        adapter_dir=given,
        needs=Needs.of(inputs.store, [source], [given]),
    )

    if not labels and known is not None:
        card = dataclasses.replace(known, name=spec.judge_id)
        if config.threshold != "calibrated":
            card = dataclasses.replace(card, threshold=config.threshold)
        return dataclasses.replace(spec, threshold=card.threshold), card

    def work(out: Path) -> None:
        given = (spec, labels, out, fleet, inputs.store.parts("judge", key))
        run_alone(config.resources, fit_judge, *given, needs=spec.needs, out=out)

    stage = inputs.store.stage("judge", key, work)
    card = judge_card(spec, labels, stage.path)
    spec = dataclasses.replace(spec, threshold=card.threshold)
    if config.adapter != "auto":
        return spec, card
    needs = spec.needs.and_folders(str(stage.path))
    return dataclasses.replace(spec, adapter_dir=str(stage.path / "adapter"), needs=needs), card


def _require_known_clauses(policy: Policy, labels: Sequence[LabelledResponse]) -> None:
    """Tell, on stderr, of labels that no question about a clause can be made of.

    Raises:
        ConfigError: there are no others.
    """
    known = {clause.id for clause in policy.clauses}
    lost = [row.clause for row in labels if row.clause and row.clause not in known]
    if not lost:
        return
    why = (
        f"the judge's labels: {len(lost)} of {len(labels)} name a clause that policy {policy.id} "
        f"{policy.version} doesn't have ({_listed(lost)}): a judge by clause can't learn from them; write "
        "the policy's own ids in their 'clause', or drop them"
    )
    if len(lost) == len(labels):
        raise ConfigError(why)
    print(f"warning: {why}", file=sys.stderr)


def _listed(clauses: Sequence[str]) -> str:
    names = list(dict.fromkeys(clauses))
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def distilled_as(config: JudgeConfig) -> str:
    """Return the ``objective`` that a judge adapter is registered under."""
    smoothed = f", smoothed {config.smoothing} times" if config.smoothing else ""
    return f"judge by {config.granularity}{smoothed}"


def _registered(
    inputs: Inputs, config: JudgeConfig, source: ModelSource
) -> tuple[str, JudgeCard | None]:
    """Return a registered judge adapter's folder, and its card where it was made for this policy."""
    reference = str(config.adapter)
    found = inputs.registry().resolve(reference, inputs.store.adapters)
    if found.base_digest and found.base_digest != source.digest:
        raise ModelError(
            f"judge.adapter: {reference} was trained on another base than judge.model (digest "
            f"{found.base_digest[:8]}, not {source.digest[:8]})"
        )
    tags, wanted = found.tags, (inputs.policy.digest, distilled_as(config))
    card = tags.get("card")
    if not card or (tags.get("policy_digest"), tags.get("objective")) != wanted:
        return str(found.path), None
    return str(found.path), JudgeCard(**json.loads(card))


def _fixed(adapter_dir: str | None, config: JudgeConfig, source: ModelSource) -> str:
    """Identity of a judge that isn't fitted: it stays the same when policy and labels change."""
    from trace_ray.models.adapters import adapter_sha256

    adapter = adapter_sha256(Path(adapter_dir)) if adapter_dir else ""
    smoothing = [config.smoothing] if config.smoothing else []
    model = [source.digest, source.tokenizer]
    return content_digest([*model, adapter, config.engine.dtype, FORM, *smoothing])


def _stage_key(
    inputs: Inputs, config: JudgeConfig, labels: list[LabelledResponse]
) -> dict[str, Any]:
    """What the fitted judge and its answers on the labels depend on."""
    kept = {"kind", "model", "revision", "adapter", "granularity", "fit", "smoothing"}
    return {
        "policy": inputs.policy.digest,
        "labels": content_digest([row.to_row() for row in labels]),
        "config": config.model_dump(mode="json", include=kept) | {"dtype": config.engine.dtype},
        "version": [__version__, FORM],
    }


def ask(
    spec: JudgeSpec, exchanges: Sequence[Exchange], store: VerdictStore | None = None
) -> list[Verdict]:
    """Return a judge's verdicts on whole replies (or single clauses, where an exchange names one).

    A judge with an engine runs in a Ray worker (Ray has to be up), any other one here. With a store,
    verdicts on whole replies (of a judge by clause, those on clauses) are looked up and kept there.
    """
    return _run_judge(spec, _ask, spec, list(exchanges), store)


def open_judge(inputs: Inputs) -> JudgeSpec:
    """Return the config's judge outside a run: no board to report to, no bar to pass."""
    return prepared_judge(inputs, Reporter(None, "judge"))[0]


def store_named_by(inputs: Inputs) -> dict[str, set[str]]:
    """Return what a config's judges are asked about, by judge: what ``verdicts gc`` keeps."""
    reporter = Reporter(None, "judge")
    specs = [evaluation_judge(inputs, reporter)]
    if inputs.config.judge is not None:
        specs.append(open_judge(inputs))
    named: dict[str, set[str]] = {}
    for spec in filter(None, specs):
        by_clause = spec.config.granularity == "clause"
        about = CLAUSES if by_clause else inputs.policy.digest
        named.setdefault(spec.digest, set()).add(about)
    return named


def has_engine(config: JudgeConfig) -> bool:
    """Return whether the judge, or a member of it, is a model in an engine of ours."""
    return config.kind == "vllm" or any(map(has_engine, config.judges))


def _ask(spec: JudgeSpec, exchanges: list[Exchange], store: VerdictStore | None) -> list[Verdict]:
    judge = spec.build()
    whole = [exchange for exchange in exchanges if exchange.clause is None]
    single = [exchange for exchange in exchanges if exchange.clause is not None]
    stored = StoredJudge(spec, judge, store)
    of_whole, of_single = iter(stored.verdicts(whole)), iter(stored.of_clauses(single))
    stored.flush()
    return [next(of_whole if each.clause is None else of_single) for each in exchanges]


def _run_judge(
    spec: JudgeSpec, function: Callable[..., Any], *args: Any, out: Path | None = None
) -> Any:
    if has_engine(spec.config):
        return run_alone(spec.config.actor_resources, function, *args, needs=spec.needs, out=out)
    return function(*args)
