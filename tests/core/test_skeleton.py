import re
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trace_ray.core.search import find, plain
from trace_ray.core.skeleton import skeleton
from trace_ray.core.visible import visible

LETTERS = (
    "aeknoxñéＡｅ𝐚ﬁаеокйёѐїўαόᾅⅰ"
    "\u0301\u0303\u0306\u0336\u0489\ufe0f'’1_ -№ºक\u094d\u0902ا\u064e中한\u1112\u1161🅰❤"
)
"""Of every kind that is read otherwise, and of kinds that must not be."""
texts = st.text(st.sampled_from(LETTERS), max_size=30) | st.text(max_size=60)


@given(texts)
@example("ў\u0301x")
@example("e\u0338\u0301\u0301а")
def test_what_was_read_once_stays(text):
    assert skeleton(skeleton(text)) == skeleton(text)


@given(st.text(st.characters(max_codepoint=127)))
def test_plain_ascii_stays(text):
    assert skeleton(text) is text


@given(texts, st.integers(0, 29), st.integers(1, 10))
def test_what_stands_in_a_text_as_written_or_as_seen_is_found(text, at, size):
    text = plain(text)
    for form in (text, visible(text)):
        if part := form[at : at + size]:
            assert find(re.escape(part), text) is not None


@given(texts, texts)
def test_a_text_that_goes_on_changes_no_earlier_word(text, more):
    before, after = skeleton(f"{text} x"), skeleton(f"{text} x {more}")
    assert after.startswith(before)


@pytest.mark.parametrize(
    "text",
    [
        "Съешь ещё этих мягких французских булок, да выпей же чаю. Дом № 5, COVID-вакцина.",
        "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. 5 kΩ, 3 µm",
        "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich",
        "El pingüino Wenceslao hizo kilómetros; el año pasado, nº 2, 1ª",
        "Do bạch kim rất quý nên sẽ dùng để lắp vô xương",
        "हम काम करते हैं। ﷺ مَرْحَبًا שָׁלוֹם ภาษาไทย 한국어 日本語、カタカナ。",
        "½ ² ™ … ℹ 🇳🇴 👍🏽 👩\u200d🚀",
    ],
)
def test_ordinary_text_of_any_language_stays(text):
    assert skeleton(text) == unicodedata.normalize("NFC", text)
