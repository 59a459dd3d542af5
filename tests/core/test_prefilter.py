import re
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_ray.core.prefilter import folded, may_match, required_words

EXAMPLES = Path(__file__).parents[2] / "examples"


def patterns_in(value):
    if isinstance(value, dict):
        for key, each in value.items():
            named = key in ("regex", "prompt_regex", "must_match", "must_not_match")
            yield from ([each] if isinstance(each, str) else each) if named else patterns_in(each)
    elif isinstance(value, list):
        for each in value:
            yield from patterns_in(each)


PATTERNS = sorted(
    {
        pattern
        for path in EXAMPLES.glob("policy-*.yaml")
        for pattern in patterns_in(yaml.safe_load(path.read_text()))
    }
)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("upgrade", ("upgrade",)),
        (r"\bUP(?:grade|date) now\b", ("update now", "upgrade now")),
        ("gr[ae]y", ("gray", "grey")),
        ("colou?rs", ("colors", "colours")),
        (r"by (?:noon|\d+)", ("by ",)),
        (r"(?:by|at) (?:noon|\d+)", ("at ", "by ")),
        (r"\d+ (?:days|weeks)", (" days", " weeks")),
        ("(?:abc)+", ("abc",)),
        ("(?:abc)*", ()),
        ("a|bcd", ()),
        ("be|bet|to", ("be", "to")),
        ("(?<!not )sure(?! of)", ("sure",)),
        ("ab.cdef", ("cdef",)),
        (r"(ab)\1", ("ab",)),
        ("caf\u00e9 noir", (" noir",)),
        ("[^a]", ()),
        ("(?x) a b  # c", ("ab",)),
    ],
)
def test_required_words(pattern, words):
    assert required_words(pattern) == words


def test_every_character_that_stands_for_an_ascii_letter_is_folded_to_it():
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    for letter in map(chr, range(128)):
        found = re.findall(re.escape(letter), every, re.IGNORECASE)
        assert {folded(each) for each in found} == {letter.lower()}


def test_most_patterns_of_the_examples_name_words():
    assert sum(bool(required_words(pattern)) for pattern in PATTERNS) > 0.8 * len(PATTERNS)


@settings(deadline=None)
@given(st.data())
def test_a_text_that_a_pattern_matches_is_never_passed_over(data):
    """Texts made from the patterns of the examples, words of other patterns around them."""
    pattern = data.draw(st.sampled_from(PATTERNS))
    match = data.draw(st.from_regex(re.compile(pattern, re.IGNORECASE)))
    around = data.draw(st.lists(st.sampled_from([*required_words(pattern), "İſ", "’", " ", "\n"])))
    text = "".join(around) + match + "".join(reversed(around))
    assert re.search(pattern, text, re.IGNORECASE) is None or may_match(
        required_words(pattern), folded(text)
    )


piece = st.sampled_from(["a", "b", "A", "ß", "İ", "s", "[sk]", ".", r"\w", r"\b", "^", "é"])


def larger(inner):
    return st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["?", "*", "+", "{2}", "{0,1}?", "{1,3}"])).map(
            lambda parts: f"(?:{parts[0]}){parts[1]}"
        ),
        inner.map(lambda part: f"(?={part})"),
        inner.map(lambda part: f"(?!{part})"),
        inner.map(lambda part: f"(?>{part})"),
        inner.map(lambda part: f"({part})"),
        inner.map(lambda part: f"(?-i:{part})"),
    )


@settings(deadline=None)
@given(st.recursive(piece, larger, max_leaves=12), st.text("abAsSkKſßİıé\u212a\n", max_size=12))
def test_any_pattern_at_all(pattern, text):
    if re.search(pattern, text, re.IGNORECASE):
        assert may_match(required_words(pattern), folded(text))
