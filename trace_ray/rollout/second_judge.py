"""Does the judge that measures agree with the one that triaged? Cohen's kappa on held-out replies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_ray import __version__
from trace_ray.core.agreement import compare_judges
from trace_ray.errors import TraceRayError
from trace_ray.rollout.judging import ask, verdict_store
from trace_ray.rollout.plan import Inputs
from trace_ray.runtime.judges import Exchange, JudgeSpec
from trace_ray.runtime.progress import Reporter
from trace_ray.runtime.store import read_rows, write_json
from trace_ray.types import EvalPrompt, Label

STAGE, RESULT = "judges", "judges.json"


def shared(first: JudgeSpec, second: JudgeSpec) -> list[str]:
    """Return the names of judges that are in both, a cascade's or quorum's members counted."""
    known = {spec.digest for spec in (second, *second.members)}
    return [spec.judge_id for spec in (first, *first.members) if spec.digest in known]


def judges_row(
    inputs: Inputs,
    triaged_by: JudgeSpec | None,
    measured_by: JudgeSpec | None,
    results: Mapping[str, Mapping[str, Any]],
    fleet: Reporter,
) -> dict[str, Any] | None:
    """Return who triaged and who measured, whether they are the same, and how far they agree.

    The triaging judge is asked about ``evaluation.judge_agreement`` replies of each model, as many
    before as after, all models in one go; the same replies are never asked about again. Where it can't
    be asked, ``error`` says why. None where nothing was triaged or measured.
    """
    evaluation = inputs.config.evaluation
    if evaluation is None or triaged_by is None or measured_by is None:
        return None
    same = shared(triaged_by, measured_by)
    row: dict[str, Any] = {
        "triage": triaged_by.judge_id,
        "gate": measured_by.judge_id,
        "same": same,
        "agreement": None,
        "models": {},
    }
    replies = {
        name: sample(read_rows(Path(path)), evaluation.judge_agreement)
        for name, result in results.items()
        if (path := result.get("answers_path")) and Path(path).is_file()
    }
    if measured_by.digest == triaged_by.digest or not any(replies.values()):
        return row

    def work(out: Path) -> None:
        fleet("comparing the judges")
        write_json(out / RESULT, _compared(inputs, triaged_by, replies))

    key = {
        "triage": [triaged_by.digest, triaged_by.threshold, triaged_by.band],
        "gate": [measured_by.digest, measured_by.threshold, measured_by.band],
        "policy": inputs.policy.digest,
        "answers": {name: Path(str(results[name]["answers_path"])).parent.name for name in replies},
        "size": evaluation.judge_agreement,
        "version": __version__,
    }
    try:
        stage = inputs.store.stage(STAGE, key, work)
    except TraceRayError as error:
        # The models are done: a judge that can't be asked once more is no reason to lose the run.
        return row | {"error": str(error)}
    return row | json.loads((stage.path / RESULT).read_text())


def _compared(
    inputs: Inputs, triaged_by: JudgeSpec, replies: Mapping[str, Sequence[tuple[Any, str, Label]]]
) -> dict[str, Any]:
    """Ask the triaging judge about every model's replies and compare its labels with theirs."""
    asked = [Exchange(prompt, text) for rows in replies.values() for prompt, text, _ in rows]
    said = iter([verdict.label for verdict in ask(triaged_by, asked, verdict_store(inputs))])
    ours = {name: [next(said) for _ in rows] for name, rows in replies.items()}
    theirs = {name: [label for _, _, label in rows] for name, rows in replies.items()}
    every = [[label for labels in of.values() for label in labels] for of in (ours, theirs)]
    models = {name: compare_judges(ours[name], theirs[name]).to_row() for name in replies}
    return {"agreement": compare_judges(*every).to_row(), "models": models}


def sample(rows: Sequence[Mapping[str, Any]], size: int) -> list[tuple[Any, str, Label]]:
    """Return (prompt, reply, the measuring judge's label) of ``size`` replies, evenly spaced.

    Half of them are the deployed model's and half the realigned one's; rows of a measurement that kept
    no labels give none.
    """
    found = []
    for side, wanted in (("before", size - size // 2), ("after", size // 2)):
        known = [row for row in rows if row.get(f"{side}_label")]
        wanted = min(wanted, len(known))
        found += [
            (EvalPrompt.from_row(row).prompt, row[side], Label(row[f"{side}_label"]))
            for row in (known[i * len(known) // wanted] for i in range(wanted))
        ]
    return found


def same_judge(row: Mapping[str, Any] | None) -> str:
    """Return the judges that both triaged and measured, in one text; empty where there is none."""
    return ", ".join(row["same"]) if row else ""


def warning(row: Mapping[str, Any] | None) -> str | None:
    """Return what is wrong with a run's judges, in words; None where nothing is."""
    if not (same := same_judge(row)):
        return None
    return (
        f"judge {same} both triaged and measures: the gate is not held out; name "
        "another one in evaluation.judge (or in judge)"
    )


def agreement_line(row: Mapping[str, Any] | None) -> str | None:
    """Return the sentence on two judges that is printed under the table; None where none was asked."""
    found = row and row["agreement"]
    if not row or not found or not found["n"]:
        return None
    kappa = found["kappa"]
    shown = (
        f"kappa {kappa['value']:.2f} [{kappa['ci_low']:.2f}, {kappa['ci_high']:.2f}]"
        if kappa
        else "kappa undefined: both always said the same one thing"
    )
    return (
        f"judges: {row['triage']} (triage) and {row['gate']} (gate) agree on "
        f"{100 * found['same']['value']:.0f}% of {found['n']} held-out replies, {shown}"
    )
