import datetime
import pickle
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trace_ray.core.checks import rule_disagreements
from trace_ray.core.policy import Policy, Tier, parse_policy
from trace_ray.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples"
POLICIES = sorted(EXAMPLES.glob("policy-*.yaml"))


def raw_policy(**changes):
    raw = {
        "id": "acme",
        "version": "2026.2",
        "supersedes": "2026.1",
        "effective_from": "2026-12-01",
        "contexts": {"self-harm": {"prompt_regex": "hurt myself"}},
        "clauses": [
            {
                "id": "explain",
                "tier": "high",
                "text": "Give a reason.",
                "exceptions": ["self-harm", "short"],
                "checks": {"when": {"regex": "can't"}, "must_include": {"any": ["because"]}},
                "examples": [{"prompt": "a", "response": "I can't", "verdict": "violates"}],
            },
            {
                "id": "short",
                "text": "Be short.",
                "checks": {"when": {"prompt_regex": "brief"}, "max_words": 5},
            },
        ],
        "tests": [{"name": "fine", "prompt": "a", "response": "b", "verdict": "complies"}],
    }
    return raw | changes


def problems_of(raw) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_policy(raw, "p.yaml")
    lines = str(caught.value).splitlines()
    assert all(line.startswith("p.yaml: ") for line in lines)
    return [line.removeprefix("p.yaml: ") for line in lines]


def clause(**changes):
    return {"id": "c", "text": "Text."} | changes


def test_a_clauses_key_knows_the_exceptions_of_its_exceptions():
    def key(context: str) -> str:
        clauses = [clause(exceptions=["d"]), clause(id="d", exceptions=["night"])]
        raw = raw_policy(clauses=clauses, contexts={"night": {"regex": context}})
        return parse_policy(raw, "p.yaml").clause_key("c")

    assert key("midnight") != key("late")


def test_reads_every_field():
    policy = parse_policy(raw_policy(), "p.yaml")
    assert (policy.id, policy.version, policy.supersedes) == ("acme", "2026.2", "2026.1")
    assert policy.effective_from == datetime.date(2026, 12, 1)
    assert policy.clauses[0].tier is Tier.HIGH
    assert policy.clauses[1].tier is Tier.STANDARD
    assert policy.clause("short").text == "Be short."
    assert policy.clauses[0].examples[0].as_prompt()[0].content == "a"
    assert [tier.rank for tier in Tier] == [0, 1, 2, 3]
    with pytest.raises(KeyError, match="no clause 'nope'"):
        policy.clause("nope")


def test_frozen_and_picklable():
    policy = parse_policy(raw_policy(), "p.yaml")
    with pytest.raises(ValueError, match="frozen"):
        policy.version = "x"
    again = pickle.loads(pickle.dumps(policy))
    assert again == policy
    assert again.digest == policy.digest


def test_all_problems_at_once():
    raw = raw_policy(
        version=2026.2,
        effective_from="soon",
        colour="red",
        clauses=[
            clause(id="a", text="  ", checks={"when": {"regex": "("}}),
            clause(id="a", checks={"when": {"regex": "x"}}, exceptions=["ghost"]),
        ],
    )
    found = problems_of(raw)
    for start in (
        "version: must be text: put it in quotes (got 2026.2)",
        "effective_from: must be a date",
        "colour: unknown key",
        "clauses.0.text: is empty",
        "clauses.0.checks.when.regex: is not a regular expression",
        "clauses.1.checks: checks nothing",
        "clauses.1.id: duplicate id 'a'",
        "clauses.1.exceptions.0: 'ghost' names no clause",
    ):
        assert any(line.startswith(start) for line in found), (start, found)
    assert len(found) == 8, found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clauses": []}, "clauses: "),
        ({"clauses": "none"}, "clauses: "),
        ({"id": None}, "id: "),
        ({"version": "a b"}, "version: use letters, digits"),
        ({"effective_from": 20261201}, "effective_from: must be a date"),
        ({"effective_from": datetime.datetime(2026, 12, 1)}, "effective_from: must be a date"),
        ({"supersedes": "2026.2"}, "supersedes: is this policy's own version"),
        ({"contexts": {"self-harm": {}, "explain": {}}}, "contexts.self-harm: needs 'regex'"),
        ({"contexts": {"c": {"regex": "x"}}, "clauses": [clause()]}, "clauses.0.id: 'c' is the"),
        ({"clauses": [clause(tier="urgent")]}, "clauses.0.tier: "),
        ({"clauses": [clause(checks={})]}, "clauses.0.checks: checks nothing"),
        ({"clauses": [clause(checks={"must_match": []})]}, "clauses.0.checks.must_match: "),
        ({"clauses": [clause(checks={"must_match": ""})]}, "clauses.0.checks.must_match.0: is emp"),
        (
            {"clauses": [clause(checks={"must_match": "["})]},
            "clauses.0.checks.must_match.0: is not",
        ),
        (
            {"clauses": [clause(checks={"must_include": {}})]},
            "clauses.0.checks.must_include: needs",
        ),
        (
            {"clauses": [clause(checks={"must_include": {"any": [" "]}})]},
            "clauses.0.checks.must_include.any.0: is empty",
        ),
        (
            {"clauses": [clause(checks={"min_words": 5, "max_words": 4})]},
            "clauses.0.checks: min_words 5 is more than max_words 4",
        ),
        ({"clauses": [clause(exceptions=["c"])]}, "clauses.0.exceptions.0: clause 'c' can't be"),
        (
            {
                "clauses": [
                    clause(exceptions=["d"]),
                    clause(id="d", exceptions=["c"]),
                ]
            },
            "clauses.0.exceptions.0: 'c' and 'd' are exceptions of each other",
        ),
        (
            {
                "clauses": [
                    clause(exceptions=["d"]),
                    clause(id="d", exceptions=["e"]),
                    clause(id="e", exceptions=["c"]),
                ]
            },
            "clauses.0.exceptions.0: by way of 'd', 'c' is an exception of itself",
        ),
        (
            {"clauses": [clause(exceptions=["d"]), clause(id="d", checks={"min_words": 1})]},
            "clauses.0.exceptions.0: 'd' applies to every reply",
        ),
        (
            {"tests": [{"name": "n", "prompt": "a", "response": "b", "verdict": "unjudged"}]},
            "tests.0.verdict: ",
        ),
        (
            {"tests": [{"name": "n", "prompt": "a", "response": "b", "verdict": "complies"}] * 2},
            "tests: 2 tests are named 'n'",
        ),
    ],
)
def test_each_problem_is_named(changes, message):
    found = problems_of(raw_policy(**changes))
    assert any(line.startswith(message) for line in found), found


@pytest.mark.parametrize("key", ["id", "version", "clauses"])
def test_missing_key(key):
    raw = raw_policy()
    del raw[key]
    assert problems_of(raw) == [f"{key}: is missing"]


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["id", "version", "clauses", "contexts", "tests", "supersedes", "x"]),
        json_like | st.lists(st.dictionaries(st.sampled_from(["id", "text", "checks"]), json_like)),
    )
)
def test_any_content_parses_or_is_a_config_error(raw):
    try:
        policy = parse_policy(raw, "f")
    except ConfigError:
        return
    assert isinstance(policy, Policy)
    assert len(policy.digest) == 64


def reordered(value, flip):
    if isinstance(value, dict):
        keys = sorted(value, key=str, reverse=flip)
        return {key: reordered(value[key], flip) for key in keys}
    if isinstance(value, list):
        return [reordered(item, flip) for item in value]
    return value


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.name)
def test_digests_are_stable_under_key_order_and_comments(path):
    text = path.read_text(encoding="utf-8")
    policy = parse_policy(yaml.safe_load(text), path.name)
    commented = yaml.safe_load("# another comment\n" + text.replace("\nid:", "\n# more\nid:", 1))
    for raw in (reordered(commented, False), reordered(commented, True)):
        other = parse_policy(raw, path.name)
        assert other.digest == policy.digest
        assert [c.digest for c in other.clauses] == [c.digest for c in policy.clauses]
    assert len(policy.digest) == len(policy.clauses[0].digest) == 64


def test_digest_changes_with_everything_that_changes_a_verdict():
    base = parse_policy(raw_policy(), "f")
    clauses = raw_policy()["clauses"]
    for changes in (
        {"id": "other"},
        {"version": "2026.3"},
        {"contexts": {"self-harm": {"prompt_regex": "harm"}}},
        {"clauses": [clauses[0] | {"text": "Give two reasons."}, clauses[1]]},
        {"clauses": [clauses[0], clauses[1] | {"checks": {"max_words": 6}}], "contexts": {}},
    ):
        raw = raw_policy(**changes)
        for item in raw["clauses"]:
            item["exceptions"] = [name for name in item.get("exceptions", ()) if name != "short"]
            if not raw["contexts"]:
                item["exceptions"] = []
        assert parse_policy(raw, "f").digest != base.digest


def test_digest_ignores_dates_tests_and_defaults_written_out():
    base = parse_policy(raw_policy(), "f")
    clauses = raw_policy()["clauses"]
    spelled = [clauses[0], clauses[1] | {"tier": "standard", "examples": []}]
    same = raw_policy(effective_from="2027-01-01", tests=[], supersedes=None, clauses=spelled)
    assert parse_policy(same, "f").digest == base.digest


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.name)
def test_shipped_policies_agree_with_their_own_examples(path):
    policy = parse_policy(yaml.safe_load(path.read_text(encoding="utf-8")), path.name)
    assert rule_disagreements(policy) == ()
    assert sum(len(item.text.split()) for item in policy.clauses) <= 150


def test_the_new_policy_supersedes_the_old():
    old, new = (
        parse_policy(yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8")), name)
        for name in ("policy-2026.1.yaml", "policy-2026.2.yaml")
    )
    assert (new.id, new.supersedes) == (old.id, old.version)
