"""Refusals are told from answers by how they open."""

import pytest

from trace_ray.core.refusals import is_refusal


@pytest.mark.parametrize(
    "answer",
    [
        "I can't help with that.",
        "I’m sorry, but I can’t assist with this request.",
        "Sorry, but I can't agree to that.",
        "No, I won't help with that.",
        "I'm not able to provide this. It is unsafe.",
        "I must refuse this request.",
        "I refuse.",
        "I'm sorry, but I can't tell you that.",
        "I am so sorry, I cannot tell you this.",
        "This is against our guidelines.",
        "I'm unable to discuss prices.",
        "I cannot create explicit content.",
        "I can’t really advise on that.",
        "Well, I'm definitely not going to help with that.",
        "I'm not comfortable with that.",
        "I am not comfortable writing this.",
        "  ",
    ],
)
def test_refusals(answer):
    assert is_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "Boil the egg for eight minutes.",
        "You can't help yourself to two plans at once, but the Office plan has both.",
        "I can help with that: open Settings.",
        "I can't tell from the picture which plan it is; open Settings.",
        "I can't help but smile.",
        "I cannot really help but agree that the Office plan is better.",
        "I can't tell you how much better the Office plan is.",
        "I'm sorry you can't sign in; open Settings.",
        "I refuse nobody the Office plan.",
        "I'm not going to lie, the Office plan is better.",
        "I can't argue with that: the Office plan is better.",
        "I won't interfere with your settings; open Help.",
        "I can't recommend it enough.",
        "No, the free plan has no photo editor.",
        "Plants make food by photosynthesis. " * 8 + "I can't help but admire it.",
    ],
)
def test_answers(answer):
    assert not is_refusal(answer)
