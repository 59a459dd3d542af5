"""The sequential test: hand-derived numbers, identities and 1,000 simulated rollouts."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from trace_ray.core.sequential import (
    Arm,
    Decision,
    SequentialConfig,
    SequentialState,
    blocks_to_catch,
    decision_stands,
    interval,
    log_evidence,
    requests_per_block,
    update,
)
from trace_ray.errors import DataError

CONFIG = SequentialConfig()
SEEDS = 1000


def draw(champion, candidate, blocks, seed, seeds=SEEDS):
    """Return both arms' verdicts, one each per block: two boolean arrays [seeds, blocks]."""
    rng = np.random.default_rng(seed)
    return rng.random((seeds, blocks)) < champion, rng.random((seeds, blocks)) < candidate


def first_decisions(champion, candidate):
    """Return (rolled back, promoted) [seeds], whichever comes first, from arrays [seeds, blocks]."""
    x = (1 + candidate.astype(float) - champion) / 2
    t = np.arange(1, x.shape[1] + 1)
    total = np.cumsum(x, axis=1)
    predicted = (0.5 + total - x) / t
    variance = np.cumsum((x - predicted) ** 2, axis=1)
    enough = math.log(1 / CONFIG.alpha)
    hits = []
    for difference, worse in ((0.0, True), (-CONFIG.margin, False)):
        hit = log_evidence(t, total, variance, difference, worse) >= enough
        hits.append(np.where(hit.any(axis=1), hit.argmax(axis=1), x.shape[1]))
    back, up = hits
    return (back < x.shape[1]) & (back <= up), (up < x.shape[1]) & (up < back)


def stream(champion, candidate):
    """Return one rollout's verdicts in order of arrival."""
    for old, new in zip(champion, candidate, strict=True):
        yield Arm.CHAMPION, bool(old)
        yield Arm.CANDIDATE, bool(new)


def test_one_block_by_hand():
    # champion complies, candidate does not: D = -1, X = 0, V = (0 - 1/2)^2, and at l = .9
    # log M has the term .9 * .5 - (log 10 - .9) * .25 = .45 - .3506.
    state = update(SequentialState(), CONFIG, [(Arm.CHAMPION, True), (Arm.CANDIDATE, False)])
    assert (state.blocks, state.total, state.variance) == (1, 0.0, 0.25)
    grid = [0.9 / 2**k for k in range(8)]
    terms = [math.exp(g / 2 - (-math.log(1 - g) - g) / 4) for g in grid]
    assert terms[0] == pytest.approx(math.exp(0.45 - 0.25 * (math.log(10) - 0.9)))
    expected = math.log(sum(terms) / 8)
    assert float(log_evidence(1, 0.0, 0.25, 0.0, worse=True)) == pytest.approx(expected)


def test_a_block_averages_the_side_that_waits():
    verdicts = [(Arm.CHAMPION, True)] * 3 + [(Arm.CHAMPION, False), (Arm.CANDIDATE, True)]
    state = update(SequentialState(), CONFIG, verdicts)
    assert state.total == pytest.approx((1 + 0.25) / 2)
    assert (state.champion_n, state.champion_complied) == (4, 3)
    assert state.open_champion_n == state.open_candidate_n == 0
    waiting = update(state, CONFIG, [(Arm.CANDIDATE, True)])
    assert (waiting.blocks, waiting.open_candidate_n) == (1, 1)


def test_batches_and_json_change_nothing():
    champion, candidate = draw(0.9, 0.8, 150, seed=3, seeds=1)
    verdicts = list(stream(champion[0], candidate[0]))
    whole = update(SequentialState(), CONFIG, verdicts)
    state = SequentialState()
    for start in range(0, len(verdicts), 7):
        state = SequentialState.from_row(json.loads(json.dumps(state.to_row())))
        state = update(state, CONFIG, verdicts[start : start + 7])
    assert state == whole


def test_the_stream_decides_as_the_arrays_do():
    for rates, decision in (((0.95, 0.5), Decision.ROLLBACK), ((0.6, 0.95), Decision.PROMOTE)):
        champion, candidate = draw(*rates, 300, seed=5, seeds=3)
        back, up = first_decisions(champion, candidate)
        for row in range(3):
            state = update(SequentialState(), CONFIG, stream(champion[row], candidate[row]))
            assert state.decision is decision
            assert (bool(back[row]), bool(up[row])) == (
                decision is Decision.ROLLBACK,
                decision is Decision.PROMOTE,
            )


def test_a_rollback_stays_and_a_candidate_that_breaks_after_its_promotion_is_rolled_back():
    state = update(SequentialState(), CONFIG, stream([True] * 60, [False] * 60))
    assert state.decision is Decision.ROLLBACK
    assert update(state, CONFIG, stream([False] * 600, [True] * 600)).decision is Decision.ROLLBACK
    good = update(SequentialState(), CONFIG, stream([True] * 600, [True] * 600))
    assert good.decision is Decision.PROMOTE
    slightly = [i % 100 > 0 for i in range(3000)]  # by less than the margin: good enough stays so
    kept = update(good, CONFIG, stream([True] * 3000, slightly))
    assert kept == replace(kept, decision=good.decision, decided_blocks=good.decided_blocks)
    broken = update(good, CONFIG, stream([True] * 300, [False] * 300))
    assert broken.decision is Decision.ROLLBACK
    assert broken.decided_blocks > good.decided_blocks


def test_a_decision_can_be_made_again_and_a_forged_one_is_found():
    for rates in ((0.9, 0.6), (0.9, 0.9)):
        champion, candidate = draw(*rates, 2000, seed=5, seeds=1)
        state = update(SequentialState(), CONFIG, stream(champion[0], candidate[0]))
        assert state.decision is not Decision.CONTINUE
        assert decision_stands(state, CONFIG)
        assert not decision_stands(replace(state, decided_blocks=3, decided_total=1.5), CONFIG)
    assert decision_stands(SequentialState(), CONFIG)


def test_the_interval_agrees_with_the_decision():
    assert (interval(SequentialState(), CONFIG).ci_low, SequentialState().blocks) == (-1.0, 0)
    state = update(SequentialState(), CONFIG, stream([True] * 20, [False] * 20))
    shown = interval(state, CONFIG)
    assert shown.value == -1.0
    assert shown.ci_low == -1.0
    assert (shown.ci_high < 0) == (state.decision is Decision.ROLLBACK)
    # swapping the arms mirrors it
    mirror = interval(update(SequentialState(), CONFIG, stream([False] * 20, [True] * 20)), CONFIG)
    assert mirror.ci_low == pytest.approx(-shown.ci_high)


def test_a_candidate_as_good_is_not_rolled_back():
    for rate in (0.9, 0.5):
        back, _ = first_decisions(*draw(rate, rate, 2500, seed=11))
        assert back.mean() <= 0.05


def test_a_drop_beyond_the_margin_is_not_promoted():
    _, up = first_decisions(*draw(0.9, 0.85, 2500, seed=13))
    assert up.mean() <= 0.05


@pytest.mark.parametrize(("champion", "candidate"), [(0.95, 0.9), (0.9, 0.85), (0.8, 0.6)])
def test_a_drop_is_caught_within_the_stated_count(champion, candidate):
    blocks = blocks_to_catch(champion, candidate, CONFIG)
    back, _ = first_decisions(*draw(champion, candidate, blocks, seed=17))
    assert back.mean() >= 0.95


def test_the_stated_count_follows_the_rates():
    five, ten = blocks_to_catch(0.9, 0.85, CONFIG), blocks_to_catch(0.9, 0.8, CONFIG)
    assert ten < five < blocks_to_catch(0.55, 0.5, CONFIG)
    assert requests_per_block(0.5) == 3
    assert requests_per_block(0.1) == pytest.approx(10 + 1 / 0.9 - 1)
    for bad in ((0.8, 0.8), (0.8, 0.9), (1.2, 0.5)):
        with pytest.raises(DataError, match="drop"):
            blocks_to_catch(*bad, CONFIG)
    with pytest.raises(DataError, match="alpha"):
        SequentialConfig(alpha=0.0)
