"""The gate: hand-derived numbers, parity, properties and 2,000 simulated gates."""

import functools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from trace_ray.core.gates import (
    GateConfig,
    GateEvidence,
    GateVerdict,
    PairedOutcomes,
    decide,
    holm,
    mcnemar_p,
    mcnemar_power,
    non_inferiority_needed,
    prompts_needed,
)
from trace_ray.errors import DataError

FEW = GateConfig(min_prompts=1)


def counts(fixed, broken, same=0):
    """Outcomes with so many prompts fixed, broken and unchanged."""
    return PairedOutcomes(
        (0.0,) * fixed + (1.0,) * broken + (1.0,) * same,
        (1.0,) * fixed + (0.0,) * broken + (1.0,) * same,
    )


def test_mcnemar_by_hand():
    # 5 fixed, 0 broken: (1/2)^5; 3 of 4: (4 + 1) / 16; nothing differs: 1.
    assert mcnemar_p([5, 3, 0], [0, 1, 0]) == pytest.approx([1 / 32, 5 / 16, 1.0])


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_equals_scipy(fixed, broken):
    if fixed + broken:
        expected = binomtest(fixed, fixed + broken, alternative="greater").pvalue
        assert float(mcnemar_p(fixed, broken)) == pytest.approx(expected, rel=1e-9)


def test_holm_by_hand():
    # sorted .01 .02 .03 .04: times 4 3 2 1 = .04 .06 .06 .04, then the running maximum.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([]) == []


def test_sample_sizes_by_hand():
    # Connor with d = .1, q = .3: (1.6449 * .5477 + .8416 * sqrt(.29))^2 / .01 = 183.3
    n = prompts_needed(0.1, 0.3)
    assert 183 <= n <= 210
    assert mcnemar_power(n, 0.1, 0.3, 0.05) >= 0.8
    # (1.6449 + .8416)^2 * .25 / .05^2 = 618.3
    assert non_inferiority_needed(0.25, 0.05) == 619
    with pytest.raises(DataError, match="gain"):
        prompts_needed(0.3, 0.1)


def test_verdicts_and_their_reasons():
    assert decide(GateEvidence(counts(20, 2, 60)), FEW).verdict is GateVerdict.PROMOTE
    worse = decide(GateEvidence(counts(2, 20, 60)), FEW)
    assert worse.verdict is GateVerdict.REJECT
    assert "worse" in worse.reasons[0]
    short = decide(GateEvidence(counts(20, 2, 8)), GateConfig(min_prompts=100))
    assert (short.verdict, short.more_samples) == (GateVerdict.HOLD, 70)
    open_ = decide(GateEvidence(counts(6, 4, 60)), FEW)
    assert open_.verdict is GateVerdict.HOLD
    assert open_.more_samples == prompts_needed(0.05, 10 / 70) - 70
    assert f"{open_.more_samples} more prompts" in open_.reasons[0]
    flat = decide(GateEvidence(counts(50, 50, 900)), FEW)
    assert flat.verdict is GateVerdict.REJECT
    assert "no gain" in flat.reasons[0]
    json.dumps(flat.to_row())


def test_one_clause_worse_rejects_a_gain():
    clauses = {"a": counts(30, 0, 50), "b": counts(0, 9, 71), "c": counts(1, 1, 78)}
    decision = decide(GateEvidence(counts(30, 9, 41), clauses), FEW)
    assert decision.verdict is GateVerdict.REJECT
    assert any("clause b" in reason for reason in decision.reasons)
    assert next(c for c in decision.clauses if c.clause == "b").p_harm == pytest.approx(3 / 512)


@pytest.mark.parametrize("measure", ["capability", "over_refusal", "asr"])
def test_non_inferiority(measure):
    bad, good = (0, 400), (0, 4)
    flip = measure != "capability"  # more refusals, or attacks that succeed, are worse
    verdicts = []
    for harm in (bad, good, (0, 40)):
        fixed, broken = harm[::-1] if flip else harm
        evidence = {measure: counts(fixed, broken, 1600)}
        verdicts.append(decide(GateEvidence(counts(20, 0, 60), **evidence), FEW).verdict)
    assert verdicts == [GateVerdict.REJECT, GateVerdict.PROMOTE, GateVerdict.HOLD]


def test_drift_and_required_measures():
    better = counts(20, 0, 60)
    limited = GateConfig(min_prompts=1, max_drift=0.1)
    for drift, verdict in ((0.05, "promote"), (0.5, "reject")):
        found = decide(GateEvidence(better, drift=(drift, drift * 1.1) * 10), limited)
        assert found.verdict == verdict
    needs = GateConfig(min_prompts=1, required=("capability",))
    held = decide(GateEvidence(better), needs)
    assert held.verdict is GateVerdict.HOLD
    assert any("not measured" in reason for reason in held.reasons)


def test_attack_success_counts_by_prompt_and_has_its_own_margin():
    better = counts(20, 0, 60)
    # Shares of a prompt's attacks: 0.05 more on average over 200 prompts.
    shares = PairedOutcomes((0.5,) * 200, (0.75,) * 40 + (0.5,) * 160)
    found = decide(GateEvidence(better, asr=shares), FEW)
    assert found.verdict is GateVerdict.REJECT
    assert found.asr is not None
    assert (found.asr.value, found.asr.n) == (pytest.approx(0.05), 200)
    wide = decide(GateEvidence(better, asr=shares), GateConfig(min_prompts=1, asr_margin=0.1))
    assert wide.verdict is GateVerdict.PROMOTE
    # Nothing changed on 3 prompts: that is not enough to tell.
    few = decide(GateEvidence(better, asr=PairedOutcomes((0.5,) * 3, (0.5,) * 3)), FEW)
    assert few.verdict is GateVerdict.HOLD
    none = decide(GateEvidence(better), FEW)
    assert none.asr is None
    assert "asr: not measured" in none.reasons


def test_bad_evidence_is_refused():
    with pytest.raises(DataError, match="as many"):
        PairedOutcomes((1.0,), ())
    with pytest.raises(DataError, match="0 or 1"):
        decide(GateEvidence(PairedOutcomes((0.5,), (1.0,))), FEW)
    assert decide(GateEvidence(PairedOutcomes((), ())), FEW).verdict is GateVerdict.HOLD


outcome = st.sampled_from([0.0, 1.0])
rows = st.lists(st.tuples(outcome, outcome, outcome, outcome), min_size=1, max_size=60)


def evidence_of(items):
    columns = list(zip(*items, strict=True))
    return GateEvidence(
        PairedOutcomes(columns[0], columns[1]), capability=PairedOutcomes(columns[2], columns[3])
    )


@settings(max_examples=25, deadline=None)
@given(rows, st.randoms(use_true_random=False))
def test_the_order_of_prompts_does_not_matter(items, random):
    shuffled = random.sample(items, len(items))
    assert decide(evidence_of(items), FEW) == decide(evidence_of(shuffled), FEW)


@settings(max_examples=25, deadline=None)
@given(st.lists(outcome, min_size=1, max_size=400))
def test_an_equal_candidate_is_never_promoted(items):
    same = PairedOutcomes(tuple(items), tuple(items))
    assert decide(GateEvidence(same), FEW).verdict is not GateVerdict.PROMOTE


@given(st.integers(0, 50), st.integers(0, 50))
def test_one_more_fixed_prompt_never_hurts(fixed, broken):
    assert mcnemar_p(fixed + 1, broken) <= mcnemar_p(fixed, broken)
    assert mcnemar_p(fixed, broken + 1) >= mcnemar_p(fixed, broken)


GATES, DISCORDANT = 4000, 0.2


def simulate(gain, n, seed):
    """Return the fixed and broken counts of many gates, [GATES] each."""
    shares = [(DISCORDANT + gain) / 2, (DISCORDANT - gain) / 2, 1 - DISCORDANT]
    drawn = np.random.default_rng(seed).multinomial(n, shares, size=GATES)
    return drawn[:, 0], drawn[:, 1]


def test_simulated_gates_keep_alpha_and_the_planned_power():
    n = prompts_needed(0.05, DISCORDANT)
    equal, better = simulate(0.0, n, 1), simulate(0.05, n, 2)
    false_promotions = float(np.mean(mcnemar_p(*equal) <= 0.05))
    power = float(np.mean(mcnemar_p(*better) <= 0.05))
    assert false_promotions <= 0.05
    assert power >= 0.8 - 3 * math.sqrt(0.16 / GATES)

    @functools.cache
    def promoted(fixed, broken):
        outcomes = counts(fixed, broken, n - fixed - broken)
        whole = decide(GateEvidence(outcomes, {"all": outcomes}), GateConfig())
        return whole.verdict is GateVerdict.PROMOTE

    for drawn in (equal, better):  # the whole gate says the same
        for fixed, broken in np.transpose(drawn)[:2000].tolist():
            assert promoted(fixed, broken) == (mcnemar_p(fixed, broken) <= 0.05)


def test_a_gate_whose_judge_is_not_held_out_holds_unless_it_is_told_not_to():
    evidence = GateEvidence(counts(60, 5, 100), same_judge="rules@1")
    held = decide(evidence, GateConfig())
    assert held.verdict is GateVerdict.HOLD
    assert any("rules@1 both triaged and measured" in reason for reason in held.reasons)
    assert decide(evidence, GateConfig(held_out=False)).verdict is GateVerdict.PROMOTE
