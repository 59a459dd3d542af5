"""Nearly the same prompts are found, by the same rule as over all pairs of sets."""

from hypothesis import given
from hypothesis import strategies as st

from trace_ray.core.overlap import PromptIndex, shingles
from trace_ray.types import Message

WORDS = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=9).map(" ".join)


def ask(text):
    return (Message("user", text),)


@given(st.lists(WORDS, min_size=1, max_size=6), WORDS, st.sampled_from([0.3, 0.5, 0.8, 1.0]))
def test_the_index_finds_what_comparing_all_finds(known, asked, threshold):
    same, near = PromptIndex([ask(text) for text in known], threshold).find(ask(asked))
    mine = shingles(ask(asked))
    assert same == [i for i, text in enumerate(known) if text == asked]
    sets = [shingles(ask(text)) for text in known]
    jaccard = [len(mine & s) / max(1, len(mine | s)) for s in sets]
    alike = {i for i, value in enumerate(jaccard) if value >= threshold and known[i] != asked}
    assert set(near) == alike


def test_spelling_does_not_hide_a_prompt():
    index = PromptIndex([ask("How do I reset my password on the web?")], 0.8)
    assert index.find(ask("how do I reset my password, on the WEB")) == ([], [0])
    assert index.find(ask("How do I reset my phone at work?")) == ([], [])


def test_prompts_without_a_word_are_like_their_equals_alone():
    index = PromptIndex([ask("???"), ask("😀"), ask("ok")], 0.5)
    assert index.find(ask("😀")) == ([1], [])
    assert index.find(ask("!")) == ([], [])
    assert index.find(ask("OK!")) == ([], [2])
