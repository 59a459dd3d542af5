"""Triaged rows on disk: read in order, in little memory, the same as rows in memory."""

import hashlib
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trace_ray.config import TrainingConfig
from trace_ray.core.triage import counts, flipped, triage
from trace_ray.rollout.lineage import set_digests
from trace_ray.rollout.report import _scored
from trace_ray.rollout.scoring import _write_scores
from trace_ray.runtime import triaged
from trace_ray.runtime.score import SCORES_FILE, ScoreSummary, conflicts_of, gold_of
from trace_ray.runtime.triaged import JudgeCounts, TriagedRows, write_triaged
from trace_ray.types import (
    Category,
    ImpactScore,
    Label,
    Message,
    PreferencePair,
    TriagedPair,
    Verdict,
    content_digest,
)

COMPLIES = Verdict(Label.COMPLIES, 0.1, "j", raw="x")
VIOLATES = Verdict(Label.VIOLATES, 0.9, "j", clause="c", reason="why")
UNSURE = Verdict(Label.UNJUDGED, 0.5, "j", reason="abstains")
SAID = [(COMPLIES, None), (VIOLATES, COMPLIES), (VIOLATES, VIOLATES), (UNSURE, None)]


def made(n):
    return [
        triage(PreferencePair((Message("user", f"q{i}"),), f"a{i}", "b", f"f:{i}"), *SAID[i % 4])
        for i in range(n)
    ]


@pytest.fixture
def small(monkeypatch):
    """Files of 150 rows, read 64 at a time."""
    monkeypatch.setattr(triaged, "MOST_ROWS", 150)
    monkeypatch.setattr(triaged, "_HELD", 1)
    monkeypatch.setattr(triaged, "_GROUP", 50)


def test_rows_come_back_in_the_order_of_their_ids(small, tmp_path):
    rows = made(1000)
    write_triaged(tmp_path / "rows", rows)
    assert len(list((tmp_path / "rows").iterdir())) == 7
    found, expected = TriagedRows(tmp_path / "rows"), sorted(rows, key=lambda row: row.pair_id)
    assert list(found) == expected
    assert list(found) == expected  # any number of times
    kinds = (Category.INVERT, Category.UNJUDGED)
    assert list(found.of(*kinds)) == [row for row in expected if row.category in kinds]
    assert found.counts() == counts(row.category for row in rows)
    assert (found.n_conflicts(), found.n_review()) == (500, 250)
    some = {row.pair_id: row for row in rows[5:9]}
    assert found.picked(some) == some
    assert found.judged() == JudgeCounts(rows=1000)
    ids = {kind: [row.pair_id for row in expected if row.category is kind] for kind in Category}
    assert found.ids() == ids


def test_files_that_nobody_sorted_are_read_in_order_too(small, tmp_path):
    rows = made(300)
    write_triaged(tmp_path / "rows", rows[:200])
    table = pa.Table.from_pylist([row.to_row() for row in rows[200:]])
    pq.write_table(table, tmp_path / "rows" / "more.parquet")
    found = TriagedRows(tmp_path / "rows")
    assert list(found) == sorted(rows, key=lambda row: row.pair_id)


def test_no_rows(tmp_path):
    write_triaged(tmp_path / "rows", [])
    found = TriagedRows(tmp_path / "rows")
    assert (list(found), found.counts()["pairs"]) == ([], 0)
    assert gold_of(found, TrainingConfig()) == []


@pytest.mark.parametrize("seed", range(4))
def test_conflicts_gold_and_flips_are_those_of_rows_in_memory(small, tmp_path, seed):
    rows = random.Random(seed).sample(made(400), 60 * (seed + 1))
    write_triaged(tmp_path / "rows", rows)
    found, config = TriagedRows(tmp_path / "rows"), TrainingConfig(seed=seed)
    in_memory = sorted(rows, key=lambda row: row.pair_id)
    assert conflicts_of(found) == conflicts_of(in_memory)
    assert gold_of(found, config) == gold_of(in_memory, config)
    assert list(flipped(found, 0.3, seed)) == list(flipped(in_memory, 0.3, seed))


def digests_of(rows):
    verdicts, categories = hashlib.sha256(), hashlib.sha256()
    for row in sorted(rows, key=lambda each: each.pair_id):
        sides = (row.verdict_chosen, row.verdict_rejected)
        said = [v and [str(v.label), v.p_violate, v.judge_id, v.clause] for v in sides]
        verdicts.update(content_digest([row.pair_id, said]).encode())
        categories.update(f"{row.pair_id} {row.category}\n".encode())
    return {"verdict_set": verdicts.hexdigest(), "triaged_set": categories.hexdigest()}


def test_the_digests_of_a_triage_and_of_pairs_that_need_none(small, tmp_path):
    rows = made(400)
    write_triaged(tmp_path / "rows", rows)
    assert set_digests(TriagedRows(tmp_path / "rows"), tmp_path) == digests_of(rows)
    (tmp_path / "pairs").mkdir()
    pq.write_table(
        pa.Table.from_pylist([row.pair.to_row() for row in rows]), tmp_path / "pairs/0.parquet"
    )
    given = Verdict(Label.COMPLIES, 0.0, "none")
    retained = [TriagedPair(row.pair, Category.RETAIN, given) for row in rows]
    assert set_digests(None, tmp_path / "pairs") == digests_of(retained)


def test_reading_holds_a_small_part_of_the_rows(monkeypatch, tmp_path):
    monkeypatch.setattr(triaged, "MOST_ROWS", 1000)
    monkeypatch.setattr(triaged, "_GROUP", 50)
    monkeypatch.setattr(triaged, "_HELD", 100)
    rng = random.Random(0)
    rows = [
        triage(PreferencePair((Message("user", rng.randbytes(400).hex()),), "a", "b"), COMPLIES)
        for _ in range(4000)
    ]
    write_triaged(tmp_path / "rows", rows)
    before, held, read = pa.total_allocated_bytes(), 0, 0
    for table in TriagedRows(tmp_path / "rows").tables():
        held = max(held, pa.total_allocated_bytes() - before)
        read += table.nbytes
    assert read > 4000 * 800
    assert held < read / 2


@pytest.mark.parametrize("earlier", [False, True])
def test_scores_are_joined_to_their_rows(small, tmp_path, earlier):
    rows = made(400)
    write_triaged(tmp_path / "rows", rows)
    given = {
        name: {row.pair_id: ImpactScore(row.pair_id, n / 7, n / 3) for n, row in enumerate(part)}
        for name, part in (("a", rows[1::4]), ("b", rows[2::8]), ("c", []))
    }
    results = {"failed": {"error": "x"}}
    for name, scores in given.items():
        (tmp_path / name).mkdir()
        _write_scores(
            tmp_path / name, ScoreSummary([*scores.values()], [], 0.0, 1.0, False, "ghost", 0)
        )
        if earlier:
            (tmp_path / name / SCORES_FILE).unlink()
        results[name] = {"scores_path": str(tmp_path / name)}
    tables = _scored("digest", TriagedRows(tmp_path / "rows"), results)
    found = pa.concat_tables(tables).to_pylist()
    assert [row["pair_id"] for row in found] == sorted(row.pair_id for row in rows)
    for row in found:
        assert row["policy_digest"] == "digest"
        assert row["scores"] == [
            {"model": name, "raw": score.raw, "weight": score.weight}
            for name, scores in given.items()
            if (score := scores.get(row["pair_id"]))
        ]
