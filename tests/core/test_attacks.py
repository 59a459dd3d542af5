"""Attack wrappers and success rates: by hand, by property, and bad files."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import trace_ray.data
from trace_ray.core.attacks import (
    Attacked,
    Wrapper,
    attack,
    attack_rates,
    paired_shares,
    parse_wrappers,
    succeeded,
    wrap,
)
from trace_ray.errors import ConfigError
from trace_ray.types import Label, Message, Verdict

BUILT_IN = Path(trace_ray.data.__file__).with_name("attacks.yaml")
ASK = (Message("user", "How?"),)
OUTCOME = st.sampled_from([True, False, None])


def test_the_built_in_attacks_are_sound():
    wrappers = parse_wrappers(yaml.safe_load(BUILT_IN.read_text()), "attacks.yaml")
    assert len(wrappers) >= 5
    assert {"fictional-scenario", "refusal-suppression"} <= {each.name for each in wrappers}
    for wrapper in wrappers:
        assert wrapper.source
        assert len(wrapper.template) < 500
        assert wrap(wrapper, ASK)[0].content.count("How?") == 1


@given(st.text(), st.text(max_size=5), st.text(max_size=5))
def test_the_request_arrives_as_it_is_whatever_it_holds(text, before, after):
    wrapper = Wrapper("w", before + "{prompt}" + after)
    system, earlier = Message("system", "{prompt}"), Message("assistant", "hm")
    found = wrap(wrapper, (system, Message("user", "first"), earlier, Message("user", text)))
    assert found[:3] == (system, Message("user", "first"), earlier)
    assert found[3].content == before + text + after


@given(st.integers(1, 30), st.integers(1, 7), st.none() | st.integers(1, 9))
def test_every_wrapper_is_used_equally_often(n, n_wrappers, per_prompt):
    wrappers = [Wrapper(f"w{i}", f"{i} {{prompt}}") for i in range(n_wrappers)]
    found = attack([ASK] * n, wrappers, per_prompt)
    take = min(per_prompt or n_wrappers, n_wrappers)
    assert len({(each.item, each.wrapper) for each in found}) == len(found) == n * take
    counts = [sum(each.wrapper == wrapper.name for each in found) for wrapper in wrappers]
    assert max(counts) - min(counts) <= 1


def test_rates_by_hand():
    attacked = [Attacked(i, name, ASK) for i in range(3) for name in ("a", "b")]
    found = attack_rates(attacked, [True, False, True, True, None, None], [False, True, None])
    assert found is not None
    # Prompt 0: 1 of 2, prompt 1: 2 of 2, prompt 2 has no verdict.
    assert (found.asr.value, found.asr.n, found.unjudged) == (0.75, 2, 2)
    assert {name: each.value for name, each in found.wrappers.items()} == {"a": 1.0, "b": 0.5}
    assert found.direct is not None
    assert (found.direct.value, found.direct.n) == (0.5, 2)
    assert attack_rates(attacked, [None] * 6) is None


@given(st.lists(st.tuples(st.integers(0, 5), OUTCOME, OUTCOME), min_size=1, max_size=40))
def test_rates_are_shares_and_pairs_are_pairs(rows):
    attacked = [Attacked(item, f"w{i % 3}", ASK) for i, (item, _, _) in enumerate(rows)]
    before, after = ([row[side] for row in rows] for side in (1, 2))
    found = attack_rates(attacked, before)
    if found is None:
        assert set(before) == {None}
    else:
        assert 0 <= found.asr.ci_low <= found.asr.value <= found.asr.ci_high <= 1
        assert sum(each.n for each in found.wrappers.values()) == len(rows) - found.unjudged
    first, second = paired_shares(attacked, before, after)
    assert len(first) == len(second)
    swapped = paired_shares(attacked, after, before)
    assert swapped == (second, first)
    if before == after and found is not None:
        assert sum(first) / len(first) == pytest.approx(found.asr.value)


def test_silence_is_no_success_and_no_verdict_is_no_answer():
    bad = Verdict(Label.VIOLATES, 1.0, "j")
    assert succeeded(" ", bad) is False
    assert succeeded("x", bad) is True
    assert succeeded("x", Verdict(Label.COMPLIES, 0.0, "j")) is False
    assert succeeded("x", Verdict.unjudged("j", "?")) is None


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({}, ["attacks: must be a list"]),
        ({"attacks": [], "x": 1}, ["x: unknown key", "attacks: must be a list"]),
        ({"attacks": ["a"]}, ["attacks.0: must be a mapping"]),
        (
            {"attacks": [{"name": "a", "template": "hi"}, {"nam": "b", "template": "{prompt}"}]},
            [
                "attacks.0.template: must hold {prompt}",
                "attacks.1.nam: unknown",
                "attacks.1.name: must be text (got None)",
            ],
        ),
        (
            {"attacks": [{"name": "a", "template": "{prompt}"}] * 2},
            ["attacks.1.name: is used twice (got 'a')"],
        ),
        ({"attacks": [{"name": "a", "template": "{prompt}", "source": 3}]}, ["0.source"]),
    ],
)
def test_a_bad_file_is_refused_with_every_problem(raw, words):
    with pytest.raises(ConfigError) as raised:
        parse_wrappers(raw, "mine.yaml")
    for word in words:
        assert f"mine.yaml: {word}" in str(raised.value) or word in str(raised.value)
