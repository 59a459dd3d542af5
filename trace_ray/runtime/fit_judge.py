"""Fits a judge on labels, and asks it about the held-out ones: what ``judge_card`` measures it by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from trace_ray.core.calibration import LabelSplit
from trace_ray.errors import JudgeError
from trace_ray.runtime.judge_card import answers_in, dealt_out, policy_labels, with_attacks
from trace_ray.runtime.judges import Exchange, Judge, JudgeSpec, VLLMJudge
from trace_ray.runtime.parts import NO_PARTS, Parts
from trace_ray.runtime.stored_judge import StoredJudge
from trace_ray.types import LabelledResponse


def fit_judge(
    spec: JudgeSpec,
    labels: Sequence[LabelledResponse],
    out: Path,
    progress: Callable[[str, int, int], None],
    parts: Parts = NO_PARTS,
) -> None:
    """Fit a judge (``adapter: auto``) and ask it about the labels it hasn't learnt from.

    Args:
        spec: the judge, its adapter not yet fitted where its config's ``adapter`` is ``auto``.
        labels: all labelled responses beside the policy's own examples.
        out: stage folder; gets ``adapter`` and the answers.
        progress: called with (what, done, total).
        parts: of an earlier attempt that was broken off.

    Raises:
        JudgeError: too few labels to fit, calibrate and measure.
    """
    import torch

    from trace_ray.models.judge_adapter import Checkpoints, fit_judge_adapter

    spec.needs.fetch()
    config = spec.config
    split = dealt_out(labels, config)
    _require_both_verdicts(split)
    torch.set_num_threads(config.resources.n_threads)
    adapter = spec.adapter_dir
    if config.adapter == "auto":
        adapter = str(out / "adapter")
        fit_judge_adapter(
            spec.model_dir,
            spec.policy,
            with_attacks([*split.fit, *policy_labels(spec.policy)], config),
            config.fit,
            Path(adapter),
            by_clause=config.granularity == "clause",
            use_cpu=config.resources.num_gpus == 0,
            on_step=lambda done, total: progress("fitting the judge", done, total),
            checkpoints=Checkpoints(partial(parts.keep, "fit"), partial(parts.restore, "fit")),
        )
    progress("measuring the judge", 0, 0)
    judge = VLLMJudge(replace(spec, adapter_dir=adapter))
    _ask(spec, judge, split, out)
    judge.engine.close()


def measure_judge(spec: JudgeSpec, labels: Sequence[LabelledResponse], out: Path) -> None:
    """Ask a judge that needs no fitting about the labels.

    Raises:
        JudgeError: too few labels, or replies that the judge can't judge.
    """
    split = dealt_out(labels, spec.config)
    _require_both_verdicts(split)
    _ask(spec, spec.build(), split, out)


def _require_both_verdicts(split: LabelSplit) -> None:
    for part, rows in (("calibration", split.calibration), ("test", split.test)):
        if len({row.violates for row in rows}) < 2:
            raise JudgeError(
                f"judge.labels: the {part} part ({len(rows)} rows) holds one verdict only; give more "
                "labelled responses of both verdicts in more groups"
            )


def _ask(spec: JudgeSpec, judge: Judge, split: LabelSplit, out: Path) -> None:
    """Keep the judge's answers on the calibration and test part in ``out``."""
    rows = [*split.calibration, *split.test]
    stored = StoredJudge(spec, judge, answers_in(out))
    verdicts = stored.verdicts([Exchange(row.prompt, row.response) for row in rows])
    missing = [verdict for verdict in verdicts if verdict.p_violate is None]
    if missing:
        raise JudgeError(
            f"judge.labels: {len(missing)} of {len(rows)} rows can't be judged: {missing[0].reason}; "
            "mend or drop them (for long ones raise judge.engine.max_model_len)"
        )
    stored.flush()
