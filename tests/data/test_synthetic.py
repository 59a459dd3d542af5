import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_ray.core.checks import violated_clauses
from trace_ray.core.policy import parse_policy
from trace_ray.data.phrases import TOPICS
from trace_ray.data.synthetic import CLAUSES, generate, write
from trace_ray.types import Category, Message, PreferencePair

EXAMPLES = Path(__file__).parents[2] / "examples"


def policy(version):
    path = EXAMPLES / f"policy-{version}.yaml"
    return parse_policy(yaml.safe_load(path.read_text(encoding="utf-8")), path.name)


OLD, NEW = policy("2026.1"), policy("2026.2")


@pytest.fixture(scope="module")
def shift():
    return generate()


def test_sizes(shift):
    categories = Counter(gold.category for gold in shift.pairs)
    assert len(shift.pairs) == 360
    assert categories == {Category.INVERT: 174, Category.PUNISH: 48, Category.RETAIN: 138}
    assert len(shift.labels) == 240
    assert sum(label.row.violates for label in shift.labels) == 120
    assert len(shift.heldout) == len(shift.heldout_pairs) == 96
    topics = {gold.topic for gold in (*shift.pairs, *shift.heldout_pairs)}
    topics |= {label.row.group for label in shift.labels}
    assert len(topics) == len(TOPICS) == 48
    assert len(shift.pairs) + len(shift.labels) // 2 + len(shift.heldout_pairs) >= 440


def test_clause_ids_are_the_policys():
    assert set(CLAUSES) == {clause.id for clause in NEW.clauses}


def test_rows_are_distinct_and_short(shift):
    pairs = [gold.pair for gold in shift.pairs]
    assert len({pair.pair_id for pair in pairs}) == len(pairs)
    assert len({pair.prompt for pair in pairs}) == len(pairs)
    assert all(pair.chosen != pair.rejected for pair in pairs)
    texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
    assert all("{" not in text and "  " not in text for text in texts)
    assert len(set(texts)) > 0.75 * len(texts)
    assert max(len(text.split()) for text in texts) <= 30
    assert max(len(pair.prompt[0].content.split()) for pair in pairs) <= 15


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.integers(6, len(TOPICS)))
def test_gold_agrees_with_the_checks_and_no_topic_is_shared(seed, topics):
    shift = generate(seed, topics)
    for gold in (*shift.pairs, *shift.heldout_pairs):
        pair = gold.pair
        for text, gold_clauses in (
            (pair.chosen, gold.violated_chosen),
            (pair.rejected, gold.violated_rejected),
        ):
            assert set(violated_clauses(NEW, pair.prompt, text)) == gold_clauses, (pair, text)
        assert violated_clauses(OLD, pair.prompt, pair.chosen) == (), pair
        assert violated_clauses(OLD, pair.prompt, pair.rejected), pair
    for label in shift.labels:
        found = set(violated_clauses(NEW, label.row.prompt, label.row.response))
        assert found == label.violated, label
        assert label.row.violates == bool(found)
    train = {gold.topic for gold in shift.pairs}
    labels = {label.row.group for label in shift.labels}
    heldout = {gold.topic for gold in shift.heldout_pairs}
    assert not train & labels | train & heldout | labels & heldout
    assert len(train | labels | heldout) == topics


def test_right_answers_are_on_topic(shift):
    for prompt, gold in zip(shift.heldout, shift.heldout_pairs, strict=True):
        assert prompt.bin is gold.category
        assert bool(prompt.must_mention) is (prompt.bin == "retain")
        if prompt.must_mention:
            right = gold.pair.chosen.lower()
            assert any(word in right for word in prompt.must_mention), right


def words(text):
    return set(re.findall(r"[\w']+", text.lower()))


@pytest.mark.parametrize("seed", range(3))
def test_no_single_word_tells_a_violation(seed):
    rows = [(words(item.row.response), item.row.violates) for item in generate(seed).labels]
    vocabulary = set().union(*(found for found, _ in rows))

    def accuracy(word):
        right = sum((word in found) == violates for found, violates in rows) / len(rows)
        return max(right, 1 - right)

    assert max(map(accuracy, vocabulary)) < 0.75


def test_every_intent_has_both_verdicts(shift):
    seen = Counter((label.intent, label.row.violates) for label in shift.labels)
    intents = {intent for intent, _ in seen}
    assert len(intents) == 8
    assert all(seen[intent, violates] for intent in intents for violates in (True, False))


def test_same_seed_same_files_other_seed_other_files(tmp_path):
    first, again = write(tmp_path / "a"), write(tmp_path / "b")
    other = write(tmp_path / "c", seed=1)
    assert set(first) == {"pairs", "gold", "labels", "heldout", "replies"}
    for name, path in first.items():
        assert path.read_bytes() == again[name].read_bytes()
        assert path.read_bytes() != other[name].read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(
        path.name for path in first.values()
    )


def test_files_join_by_pair_id(tmp_path, shift):
    files = write(tmp_path)

    def rows(name):
        return [json.loads(line) for line in files[name].read_text(encoding="utf-8").splitlines()]

    ids = [
        PreferencePair((Message("user", row["prompt"]),), row["chosen"], row["rejected"]).pair_id
        for row in rows("pairs")
    ]
    gold = rows("gold")
    assert ids == [row["pair_id"] for row in gold]
    assert {row["category"] for row in gold} == {"invert", "punish", "retain"}
    assert all(set(row["clauses"]) == set(CLAUSES) for row in gold)
    assert {row["verdict"] for row in rows("labels")} == {"complies", "violates"}
    assert set(rows("labels")[0]) == {"prompt", "response", "verdict", "group"}
    assert set(rows("heldout")[0]) == {"prompt", "bin", "must_mention"}


@pytest.mark.parametrize("topics", [0, 5, len(TOPICS) + 1])
def test_too_few_or_too_many_topics(topics):
    with pytest.raises(ValueError, match="topics must be between"):
        generate(0, topics)


def test_a_perfect_oracle_complies(shift):
    punished = [gold.pair.prompt for gold in shift.pairs if gold.category is Category.PUNISH]
    assert len(punished) == len(shift.replies)
    for prompt, reply in zip(punished, shift.replies, strict=True):
        assert not violated_clauses(NEW, prompt, reply)
