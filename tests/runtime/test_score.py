import functools
import json
import math

import pytest
import torch

from trace_ray.config import ImpactConfig, LoraConfig, Resources, TrainingConfig
from trace_ray.errors import DataError
from trace_ray.models import scorer
from trace_ray.runtime.needs import NOTHING
from trace_ray.runtime.parts import Parts
from trace_ray.runtime.score import (
    Scoring,
    conflicts_of,
    score_conflicts,
    score_on_cluster,
    shard,
)
from trace_ray.runtime.train import WorkerGroup
from trace_ray.testing import tiny_adapter, tiny_model
from trace_ray.types import Category, Label, Message, PreferencePair, TriagedPair, Verdict

LORA = LoraConfig(r=8, alpha=16, dropout=0, targets=["q_proj", "v_proj"])
VERDICT = Verdict(Label.VIOLATES, 1.0, "test")
WORDS = ["reset", "billing", "shared", "folder", "invoice", "export", "login", "sync", "draft"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_model(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def deployed(base, tmp_path_factory):
    return str(tiny_adapter(tmp_path_factory.mktemp("deployed"), base, seed=1))


def triaged():
    kinds = [Category.INVERT, Category.PUNISH, Category.RETAIN, Category.INVERT, Category.RETAIN]
    return [
        TriagedPair(
            PreferencePair((Message("user", f"{a} {b}?"),), f"no {a}", f"yes {b} {a}"),
            kinds[(i * j) % 5],
            VERDICT,
        )
        for i, a in enumerate(WORDS)
        for j, b in enumerate(WORDS[:3])
    ]


def settings(method, **changes):
    impact = ImpactConfig(method=method, gold_batch=9, **changes)
    return TrainingConfig(lora=LORA, impact=impact, beta=0.3)


def scores(base, adapter, method, rows=None, **changes):
    rows = triaged() if rows is None else rows
    found = score_conflicts(base, adapter, rows, settings(method, **changes), num_threads=1)
    return found, by_id(found)


def by_id(summary):
    """Raw scores by pair, whatever the order of the rows."""
    return torch.tensor([score.raw for score in sorted(summary.scores, key=lambda s: s.pair_id)])


def error(got, expected):
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("with_adapter", [True, False])
def test_the_engines_agree(base, deployed, with_adapter, monkeypatch):
    adapter = deployed if with_adapter else None
    exact, a = scores(base, adapter, "jvp")
    assert exact.method == "jvp"
    kinds = {row.pair_id: row.category for row in triaged()}
    assert all(kinds[s.pair_id] in (Category.INVERT, Category.PUNISH) for s in exact.scores)
    assert sum(s.weight for s in exact.scores) / len(exact.scores) == pytest.approx(1)
    assert error(scores(base, adapter, "ghost")[1], a) < 1e-5
    assert error(scores(base, adapter, "fd")[1], a) < 5e-3
    monkeypatch.setattr(scorer, "can_pack", lambda *_: False)
    assert error(scores(base, adapter, "ghost")[1], a) < 1e-5
    assert error(scores(base, adapter, "jvp")[1], a) < 1e-5


@pytest.mark.parametrize("method", ["jvp", "ghost"])
def test_scores_do_not_depend_on_batch_size_or_order(base, deployed, method):
    _, whole = scores(base, deployed, method, batch_tokens=4096)
    assert error(scores(base, deployed, method, batch_tokens=1)[1], whole) < 1e-5
    reverse = triaged()[::-1]
    assert error(scores(base, deployed, method, rows=reverse, batch_tokens=200)[1], whole) < 1e-5


@pytest.mark.parametrize("method", ["jvp", "ghost"])
def test_a_common_system_message_changes_nothing(base, deployed, method, monkeypatch):
    system = Message("system", "You answer for a photo editor's help desk.")
    rows = [
        TriagedPair(
            PreferencePair((system, *row.pair.prompt), row.pair.chosen, row.pair.rejected),
            row.category,
            VERDICT,
        )
        for row in triaged()
    ]
    rows += triaged()[:4]  # some without it
    _, headed = scores(base, deployed, method, rows=rows)
    monkeypatch.setattr(scorer, "SHORTEST_HEAD", 10**6)
    assert error(scores(base, deployed, method, rows=rows)[1], headed) < 1e-5


def test_the_head_is_what_most_prompts_begin_with(monkeypatch):
    monkeypatch.setattr(scorer, "SHORTEST_HEAD", 2)
    prompts = [[1, 2, 3, n] for n in range(10)]
    assert scorer.common_head(prompts) == [1, 2, 3]
    assert scorer.common_head([*prompts, [7, 7], [1]]) == [1, 2, 3]
    assert scorer.common_head([[1, 2, 3]] * 10) == [1, 2]  # the last token predicts
    assert scorer.common_head(prompts[:4]) == []  # too few to be worth it
    assert scorer.common_head([]) == []


def test_shards_give_the_same_scores(cluster, base, deployed):
    config = settings("ghost", workers=2)
    whole, a = scores(base, deployed, "ghost")
    seen = []
    scoring = Scoring(base, deployed, config, num_threads=1)
    resources = Resources(num_cpus=1)
    split = score_on_cluster(scoring, triaged(), resources, lambda *at: seen.append(at))
    assert [s.pair_id for s in split.scores] == [s.pair_id for s in whole.scores]
    assert error(by_id(split), a) < 1e-5
    assert split.effective_sample_size == pytest.approx(whole.effective_sample_size, rel=1e-4)
    assert split.gold == whole.gold
    assert seen[-1] == (len(split.scores), len(split.scores))


def test_workers_that_share_the_base_find_what_one_does(cluster, base, deployed, tmp_path):
    methods = {"ghost": ("ghost", {}), "fd": ("fd", {})}
    methods |= {"adam": ("ghost", {"preconditioner": "adam", "batch_tokens": 100})}
    cases = {
        (name, adapter): settings(method, **changes)
        for name, (method, changes) in methods.items()
        for adapter in (None, deployed)
    }
    rows = triaged()[:-2]  # the last round has a batch for one worker alone

    def work(_):  # in here, so that it travels to a worker by value
        import ray.train

        found, told = [], []
        for (_, adapter), config in cases.items():
            summary = score_conflicts(
                base,
                adapter,
                rows,
                config,
                num_threads=1,
                shares=True,
                progress=lambda *at: told.append(at),
            )
            found.append({score.pair_id: score.raw for score in summary.scores})
        rank = ray.train.get_context().get_world_rank()
        (tmp_path / f"{rank}.json").write_text(json.dumps([found, told]))

    group = WorkerGroup(2, Resources(num_cpus=1, threads=1), "scores", str(tmp_path), NOTHING)
    group.run(work, {})
    (found, told), (mates, _) = (json.loads((tmp_path / f"{i}.json").read_text()) for i in (0, 1))
    assert found == mates
    assert (told[0][0], told[-1][0]) == (0, told[-1][1])
    for ((name, adapter), config), got in zip(cases.items(), found, strict=True):
        whole = score_conflicts(base, adapter, rows, config, num_threads=1)
        expected = {score.pair_id: score.raw for score in whole.scores}
        assert got.keys() == expected.keys()
        off = error(torch.tensor(list(got.values())), torch.tensor(list(expected.values())))
        assert off < (5e-3 if name == "fd" else 1e-4), name


def test_an_error_of_ours_leaves_a_group_as_itself(cluster, tmp_path):
    def work(_):
        raise DataError("rows.parquet: row 3 has no prompt")

    group = WorkerGroup(1, Resources(num_cpus=1, threads=1), "broken", str(tmp_path), NOTHING)
    with pytest.raises(DataError, match=r"^rows.parquet: row 3 has no prompt$"):
        group.run_afresh(work, {}, "support: scoring")
    assert not (tmp_path / "broken").exists()


def test_shards_hold_each_row_once_and_a_prompt_together():
    rows = conflicts_of(triaged())
    rows += [c for c in rows[:3]]  # prompts that come twice
    for workers in (1, 2, 5, 1000):
        shards = shard(rows, workers)
        assert sorted(i for part in shards for i in part) == list(range(len(rows)))
        assert all(shards)
        homes = [{rows[i].prompt for i in part} for part in shards]
        assert sum(map(len, homes)) == len(set().union(*homes))
    assert shard([], 3) == []


def test_each_distinct_response_is_computed_once(base, monkeypatch):
    """``fd`` and ``jvp`` put a prompt's responses in one row, whatever pairs they stand in."""
    from trace_ray.models.likelihood import Likelihood

    prompt = (Message("user", "reset?"),)
    texts = ["no", "yes", "perhaps"]
    pairs = [
        TriagedPair(PreferencePair(prompt, a, b), Category.INVERT, VERDICT)
        for a in texts
        for b in texts
        if a != b
    ]
    computed = []
    evaluate = Likelihood.__call__

    def spy(self, groups, *more):
        computed.append(sum(map(len, groups)))
        return evaluate(self, groups, *more)

    monkeypatch.setattr(Likelihood, "__call__", spy)
    found, _ = scores(base, None, "jvp", rows=pairs)
    assert len(found.scores) == 6
    assert computed[-1] == 3  # those before are the gold batch


def test_the_gold_batch_is_seeded(base):
    (one, _), (two, _) = (scores(base, None, "ghost") for _ in range(2))
    assert one.gold == two.gold
    assert len(one.gold) == 9


def test_no_conflicts_need_no_gold_and_no_model():
    rows = [row for row in triaged() if row.category is Category.RETAIN]
    found, _ = scores("nowhere", None, "ghost", rows=rows)
    assert (found.scores, found.share_clamped) == ([], 0)


def test_conflicts_without_a_gold_pair_are_refused(base):
    rows = [row for row in triaged() if row.category is Category.PUNISH]
    with pytest.raises(DataError, match=r"gold batch is empty.*no_impact"):
        scores(base, None, "ghost", rows=rows)


def test_a_score_that_is_not_finite_names_its_pair(base, monkeypatch):
    monkeypatch.setattr(scorer.Scorer, "raw_scores", lambda _self, rows, *_: [math.nan] * len(rows))
    first = conflicts_of(triaged())[0].pair_id
    with pytest.raises(DataError, match=f"NaN or infinite, the first for pairs {first}"):
        scores(base, None, "ghost")


def test_scoring_goes_on_where_it_was_broken_off(base, deployed, tmp_path):
    config, rows = settings("ghost", save_rows=4), triaged()
    score = functools.partial(score_conflicts, base, deployed, rows, config, num_threads=1)
    undisturbed = score()
    parts, seen = Parts(str(tmp_path / "parts")), []

    def interrupt(done, _):
        if done > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(parts=parts, progress=interrupt)
    resumed = score(parts=parts, progress=lambda *at: seen.append(at))
    assert resumed == undisturbed
    assert seen[0] == (8, len(resumed.scores))
    assert seen[-1] == (len(resumed.scores), len(resumed.scores))


def test_bfloat16_is_near_and_not_for_differences(base, deployed):
    _, exact = scores(base, deployed, "ghost")
    _, near = scores(base, deployed, "ghost", autocast="bfloat16")
    assert 0 < error(near, exact) < 0.1
    with pytest.raises(ValueError, match="noise"):
        ImpactConfig(method="fd", autocast="bfloat16")


def test_adam_does_not_depend_on_the_batch(base, deployed):
    _, a = scores(base, deployed, "ghost", preconditioner="adam", batch_tokens=4096)
    _, b = scores(base, deployed, "ghost", preconditioner="adam", batch_tokens=1)
    _, plain = scores(base, deployed, "ghost")
    assert error(a, b) < 1e-4
    assert error(a, plain) > 0.1
