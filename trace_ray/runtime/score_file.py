"""``trace-ray score``: impact scores of one model over files, without a fleet config or a cluster."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from trace_ray.config import TrainingConfig, validation_problems
from trace_ray.data.sources import read_categorised, read_preferences
from trace_ray.errors import ConfigError, DataError, ModelError
from trace_ray.models.families import positions_of, read_config, too_long
from trace_ray.runtime.score import ScoreSummary, Scoring, score_against
from trace_ray.runtime.store import write_text
from trace_ray.types import Category

if TYPE_CHECKING:
    from trace_ray.core.impact import GoldPair
    from trace_ray.models.scorer import Conflict


def score_files(
    model: Path, adapter: Path | None, triaged: Path, gold: Path, out: Path, config: TrainingConfig
) -> str:
    """Score the conflicts of ``triaged`` along the gradient of ``gold`` and write ``out``.

    Args:
        model: directory of the base model.
        adapter: directory of the deployed adapter, or None.
        triaged: jsonl of ``{pair_id, prompt, chosen, rejected, category}`` in the ORIGINAL order.
        gold: jsonl of ``{prompt, chosen, rejected}``, ``chosen`` preferred under the NEW policy.
        out: jsonl of ``{pair_id, raw_score, weight}``, conflicts only, in the order of ``triaged``.
        config: from ``score_config``.

    Returns:
        A line that says what was done.

    Raises:
        ConfigError: the model has fewer positions than ``max_length``.
        DataError: a file can't be used; names file, line and field.
        ModelError: the model or the adapter can't be used, or it was trained on another base.
    """
    if why := too_long(config.max_length, str(model), positions_of(read_config(model))):
        raise ConfigError(f"--max-length: {why}")
    if adapter is not None:
        _check_base(model, adapter)
    conflicts, skipped = _conflicts(triaged)
    pairs = _gold(gold)
    scoring = Scoring(str(model), str(adapter) if adapter else None, config)
    summary = score_against(scoring, conflicts, pairs)
    rows = [
        {"pair_id": score.pair_id, "raw_score": score.raw, "weight": score.weight}
        for score in summary.scores
    ]
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    said = f"{out}: {_sentence(conflicts, skipped, summary, config)}"
    if alike := _count_alike(model, conflicts, config.max_length):
        said += (
            f"; of {alike} conflicts both sides are the same tokens within --max-length "
            f"{config.max_length}"
        )
    return said


def _check_base(model: Path, adapter: Path) -> None:
    """Refuse an adapter that says it was trained on another base."""
    from trace_ray.models.adapters import read_base_digest
    from trace_ray.models.references import model_digest

    recorded = read_base_digest(adapter)
    if recorded is None or not (model / "config.json").is_file():
        return
    with tempfile.TemporaryDirectory() as cache:
        found = model_digest(model, Path(cache))
    if found != recorded:
        raise ModelError(
            f"--adapter {adapter}: was trained on another base than --model {model} (digest "
            f"{recorded[:8]}, not {found[:8]}); give the base it was trained on"
        )


def score_config(
    options: Mapping[str, Any], lora: Mapping[str, Any], adapter: Path | None
) -> tuple[TrainingConfig, str | None]:
    """Return the training section that the command's options stand for, and a note for the user.

    Args:
        options: training options by their config path (``beta``, ``impact.gamma``).
        lora: the LoRA options that were given.
        adapter: the deployed adapter, whose own shape takes the place of ``lora``.

    Raises:
        ConfigError: an option has a value it can't have.
        ModelError: the adapter has no readable config.
    """
    note = None
    shape: dict[str, Any] = dict(lora)
    if adapter is not None:
        shape = _adapter_shape(adapter)
        wanted = {k: sorted(v) if isinstance(v, list) else v for k, v in lora.items()}
        if wanted != {name: shape[name] for name in lora}:
            own = f"r {shape['r']}, alpha {shape['alpha']:g}, targets {shape['targets']}"
            note = f"note: {adapter} has its own shape ({own}); other --lora options are ignored"
    raw: dict[str, Any] = {"lora": {"dropout": 0, **shape}, "impact": {}}
    for path, value in options.items():
        section, _, name = path.rpartition(".")
        (raw[section] if section else raw)[name] = value
    try:
        return TrainingConfig.model_validate(raw), note
    except ValidationError as error:
        raise validation_problems("trace-ray score", error) from None


def _adapter_shape(adapter: Path) -> dict[str, Any]:
    from trace_ray.models.adapters import check_adapter

    check_adapter(adapter)
    saved = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    targets = saved["target_modules"]
    return {
        "r": saved["r"],
        "alpha": float(saved["lora_alpha"]),
        # A pattern (text) names no list of layers: peft reads it from the adapter itself.
        "targets": sorted(targets) if isinstance(targets, list) else "all-linear",
    }


def _conflicts(path: Path) -> tuple[list[Conflict], Counter[str]]:
    """Return the rows to score and how many rows of which other category there are."""
    from trace_ray.models.scorer import Conflict

    rows = read_categorised(path)
    ids = Counter(pair_id for pair_id, _, _ in rows)
    twice = [pair_id for pair_id, n in ids.items() if n > 1]
    if twice:
        raise DataError(
            f"{path}: pair_id: {len(twice)} ids stand in several rows, e.g. {twice[0]!r}; a score is "
            "found by its id, so each needs its own"
        )
    conflicts = [
        Conflict(pair_id, pair.prompt, pair.chosen, pair.rejected, category)
        for pair_id, pair, category in rows
        if category in (Category.INVERT, Category.PUNISH)
    ]
    skipped = Counter(str(c) for _, _, c in rows if c not in (Category.INVERT, Category.PUNISH))
    return conflicts, skipped


def _count_alike(model: Path, conflicts: Sequence[Conflict], max_length: int) -> int:
    """Count the conflicts whose sides are one and the same to the model."""
    from trace_ray.models.collate import encode_sides
    from trace_ray.models.families import load_tokenizer

    if not conflicts:
        return 0
    tokenizer = load_tokenizer(model)
    sides = (
        encode_sides(tokenizer, row.prompt, (row.chosen, row.rejected), max_length)[1]
        for row in conflicts
    )
    return sum(chosen == rejected for (chosen, _), (rejected, _) in sides)


def _gold(path: Path) -> list[GoldPair]:
    from trace_ray.core.impact import GoldPair

    if path.is_file() and not path.read_bytes().strip():
        raise DataError(
            f"{path}: holds no gold pair; put in pairs {{prompt, chosen, rejected}} ordered as the new "
            "policy prefers: their gradient is what conflicts are scored against"
        )
    return [
        GoldPair(pair.prompt, pair.chosen, pair.rejected, pair.source, Category.RETAIN)
        for pair in read_preferences(path)
    ]


def _sentence(
    conflicts: Sequence[Conflict],
    skipped: Counter[str],
    summary: ScoreSummary,
    config: TrainingConfig,
) -> str:
    kinds = Counter(row.category for row in conflicts)
    found = [
        f"{len(conflicts)} scores by {summary.method} ({kinds[Category.INVERT]} invert, "
        f"{kinds[Category.PUNISH]} punish) along {len(summary.gold)} gold pairs"
    ]
    found += [f"{n} {name} rows have no score" for name, n in sorted(skipped.items())]
    if conflicts:
        found.append(
            f"{summary.share_clamped:.0%} clamped to 0, effective sample size "
            f"{summary.effective_sample_size:.1f}"
        )
    if summary.uniform_fallback:
        found.append("no score is positive, so all weights are alike (uniform fallback)")
    if summary.truncated:
        found.append(f"{summary.truncated} responses cut to --max-length {config.max_length}")
    return "; ".join(found)
