"""From the judge's triage to what models train on: corrected pairs, and flips for noise studies."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ray import __version__
from trace_ray.config import Resources
from trace_ray.config.oracle import FileOracle, VLLMOracle
from trace_ray.core.objectives import CORRECTED
from trace_ray.core.triage import flipped
from trace_ray.models.references import remembered_digest
from trace_ray.rollout.judging import ask, verdict_store
from trace_ray.rollout.plan import Inputs
from trace_ray.rollout.unanswered import key_after, note_open
from trace_ray.runtime import oracle as oracles
from trace_ray.runtime.cluster import run_alone
from trace_ray.runtime.judges import JudgeSpec
from trace_ray.runtime.needs import NOTHING, Needs
from trace_ray.runtime.progress import Reporter
from trace_ray.runtime.store import StageResult, write_text
from trace_ray.runtime.triaged import TriagedRows, write_triaged
from trace_ray.types import Category, TriagedPair, content_digest

CORRECTIONS, CONFLICTS = "corrections", "conflicts"
"""The stages: what the oracle wrote and the judge accepted, and the rows with it."""
ROWS, REPLIES, ACCEPTED, COUNTS = "rows", "replies.json", "accepted.json", "counts.json"


@dataclass(frozen=True, slots=True)
class Prepared:
    """The rows every model trains on."""

    rows: TriagedRows
    folder: Path
    """Stage folder that holds them."""
    corrections: dict[str, Any] | None
    """How many PUNISH pairs the oracle was ``asked`` for and how many replies were ``accepted``.

    ``failed`` holds, by reason, at how many its endpoint failed; ``unanswered`` how many the next run
    asks for again because the ``oracle`` or the ``judge`` was down.
    """


def prepare(
    inputs: Inputs, rows: TriagedRows, folder: Path, judge: JudgeSpec, fleet: Reporter
) -> Prepared:
    """Return what models train on: the triage itself, unless the config asks for a change of it."""
    config = inputs.config
    corrects = config.oracle is not None and config.objective in CORRECTED
    if not corrects and not config.flip_labels:
        return Prepared(rows, folder, None)
    fleet("preparing conflicts")
    accepted, counts = {}, None
    if corrects:
        made = _corrections(inputs, rows, folder, judge, fleet)
        accepted = json.loads((made / ACCEPTED).read_text())
        counts = json.loads((made / COUNTS).read_text())
    key = {
        "triage": folder.name,
        # Models are trained anew for other corrections, not for every time that some were asked for.
        "corrections": content_digest(accepted) if corrects else "",
        "flip_labels": config.flip_labels,
        "seed": config.training.seed,
        "version": __version__,
    }

    def work(out: Path) -> None:
        fixed = {pair_id: TriagedPair.from_row(row) for pair_id, row in accepted.items()}
        found = flipped(rows, config.flip_labels, config.training.seed)
        write_triaged(out / ROWS, (fixed.get(row.pair_id, row) for row in found))

    stage: StageResult = inputs.store.stage(CONFLICTS, key, work)
    return Prepared(TriagedRows(stage.path / ROWS), stage.path, counts)


def _corrections(
    inputs: Inputs, rows: TriagedRows, folder: Path, judge: JudgeSpec, fleet: Reporter
) -> Path:
    """Return the stage folder with the PUNISH rows that could be corrected, by the ids they had."""
    config, oracle = inputs.config, inputs.config.oracle
    asks = {
        "judge": judge.judge_id,
        "threshold": judge.threshold,
        "oracle": oracle.model_dump(mode="json") if oracle else None,
        "replies": _replies_digest(inputs),
        "flip_labels": config.flip_labels,
        "seed": config.training.seed,
        "policy": inputs.policy.digest,
        "version": __version__,
    }

    def work(out: Path) -> None:
        found = flipped(rows, config.flip_labels, config.training.seed)
        punished = [row for row in found if row.category is Category.PUNISH]
        replies = _replies(inputs, punished, _known(inputs, asks), fleet)
        fleet("judging corrected responses")
        store = verdict_store(inputs)
        fixed, down = oracles.correct(punished, replies, lambda asked: ask(judge, asked, store))
        n_lost = sum(not oracles.is_written(each) for each in replies)
        counts = {
            "asked": len(punished),
            "accepted": len(fixed),
            "failed": dict(Counter(each for each in replies if isinstance(each, str))),
            "unanswered": {"oracle": n_lost, "judge": len(down)},
        }
        kept = {
            row.pair_id: _accepted_first(each, fixed.get(row.pair_id))
            for row, each in zip(punished, replies, strict=True)
        }
        accepted = {pair_id: row.to_row() for pair_id, row in fixed.items()}
        for name, value in ((REPLIES, kept), (ACCEPTED, accepted), (COUNTS, counts)):
            write_text(out / name, json.dumps(value))
        note_open(inputs, out, n_lost + len(down))

    key = key_after(inputs, CORRECTIONS, asks | {"triage": folder.name})
    return inputs.store.stage(CORRECTIONS, key, work).path


def _known(inputs: Inputs, asks: dict[str, Any]) -> dict[str, list[str] | str]:
    """Return the replies that were last written for the same question, of this triage or another."""
    for folder, record in inputs.store.finished(CORRECTIONS):
        if asks.items() <= record["inputs"].items():
            kept = json.loads((folder / REPLIES).read_text())
            return {pair_id: each for pair_id, each in kept.items() if oracles.is_written(each)}
    return {}


def _accepted_first(reply: list[str] | str, fixed: TriagedPair | None) -> list[str] | str:
    """Return a pair's replies as they are kept: what was accepted stays so, whatever the rest is."""
    if isinstance(reply, str) or fixed is None:
        return reply
    return sorted(reply, key=lambda text: text.strip() != fixed.pair.rejected)


def _replies_digest(inputs: Inputs) -> str:
    """Digest of the oracle's file; empty for one that writes its replies."""
    oracle = inputs.config.oracle
    if oracle is None or oracle.kind != "file":
        return ""
    return remembered_digest([Path(oracle.path)], Path(inputs.config.storage))


def _replies(
    inputs: Inputs,
    punished: list[TriagedPair],
    known: dict[str, list[str] | str],
    fleet: Reporter,
) -> oracles.Replies:
    """Return what the oracle wrote for each PUNISH row; it is asked for what is not known."""
    oracle = inputs.config.oracle
    if oracle is None:
        raise ValueError("corrections need an oracle")
    prompts = {row.pair_id: row.pair.prompt for row in punished if row.pair_id not in known}
    if not prompts:
        return [known[row.pair_id] for row in punished]
    fleet("corrected responses", 0, len(prompts))
    store, needs, writes = inputs.store, NOTHING, Resources()
    if isinstance(oracle, VLLMOracle):
        writes = oracle.resources
        if oracle.adapter:
            oracle = oracle.model_copy(update={"adapter": str(store.shared(oracle.adapter))})
            needs = Needs.of(store, folders=[oracle.adapter])
    n_known = len(punished) - len(prompts)
    given = (oracle, inputs.policy, list(prompts.values()), store.models, n_known)
    if isinstance(oracle, FileOracle):  # the file is here
        written = oracles.write_replies(*given)
    else:
        written = run_alone(writes, oracles.write_replies, *given, needs=needs)
    found = known | dict(zip(prompts, written, strict=True))
    return [found[row.pair_id] for row in punished]
