"""A text with its letters as they are read, whatever they are written with.

After the skeletons of Unicode's TR39, but only as far as ordinary text of any language stays as it is:
a word wholly in Cyrillic letters is a Cyrillic one, be it made of look-alikes alone.
"""

from __future__ import annotations

import re
import unicodedata

_LATIN = re.compile("[A-Za-z\u00aa\u00ba\u00c0-\u024f\u1e00-\u1eff]")
_OTHER = re.compile("[\u0370-\u03ff\u0400-\u052f\u1f00-\u1fff\u2160-\u217f]")
"""Greek, Cyrillic, Roman numerals: letters of these look like Latin ones."""
_WORD = re.compile(r"\w+(?:'\w+)*")
_MARK_RANGES = (
    "\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe00-\ufe0f\ufe20-\ufe2f"
)
"""Marks that go on any letter, and variation selectors. Those of one script are its vowels."""
_MARKS = re.compile(f"[{_MARK_RANGES}]+")
_PILE = re.compile(rf"\w[{_MARK_RANGES}]{{2,}}")
_SMALL_CAPITALS = "ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢɑɡ"
_FANCY = re.compile(
    # Signs that read as their own (№ ™ ª ½ ℹ) are none of these, nor are the letters of flags.
    f"[{_SMALL_CAPITALS}"
    "\u02b0-\u02b8\u02e1-\u02e3\u1d2c-\u1d6a\u1d9c-\u1dbf\u2071\u207f\u2090-\u209c"  # raised, lowered
    "\u2102\u210a-\u2113\u2115\u2119-\u211d\u2124-\u2134\u2145-\u2149"  # double-struck, script
    "\U0001d400-\U0001d7ff\uff01-\uff5e\ufb00-\ufb06"  # mathematical, full-width, ligatures
    "\u24b6-\u24e9\U0001f130-\U0001f149\U0001f150-\U0001f169\U0001f170-\U0001f189]+"  # framed
)
_SHAPES = str.maketrans(
    dict(zip(_SMALL_CAPITALS, "abcdefghijklmnoprstuvwyzag", strict=True))
    | {chr(first + i): chr(65 + i) for first in (0x1F150, 0x1F170) for i in range(26)}
)
"""What Unicode has no plain form for."""
_LOOKS = str.maketrans(
    "аеорсухіјѕһԁԛԝѵӏүкмтнвАВЕКМНОРСТУХІЈЅҺԚԜѴӀҮαεηικνορτυχωγϲϳΑΒΕΖΗΙΚΜΝΟΡΤΥΧϹⅰⅴⅹⅼⅽⅾⅿⅠⅤⅩⅬⅭⅮⅯ",
    "aeopcyxijshdqwvlykmthbABEKMHOPCTYXIJSHQWVIYaenikvoptuxwycjABEZHIKMNOPTYXCivxlcdmIVXLCDM",
)
"""The look-alikes of Latin letters; only words that mix scripts are read by it."""


def skeleton(text: str) -> str:
    """Return a visible text with its letters as they are read.

    Full-width, mathematical, framed and small letters and ligatures become plain ones; marks that
    make no letter of their own (strokes through a word, piles) are left out, while ñ stays ñ; in words
    that mix Latin with Cyrillic or Greek letters, those that look Latin become Latin.
    """
    if text.isascii():
        return text
    if _FANCY.search(text):
        text = _FANCY.sub(_plain_shapes, text)
    text = unicodedata.normalize("NFC", text)
    if _MARKS.search(text):
        text = _without_marks(text)
    if _OTHER.search(text) and _LATIN.search(text):
        text = _WORD.sub(_one_script, text)
    return text


def _plain_shapes(found: re.Match[str]) -> str:
    return unicodedata.normalize("NFKC", found.group()).translate(_SHAPES)


def _without_marks(text: str) -> str:
    return _MARKS.sub("", _PILE.sub(_bare_letter, text))


def _bare_letter(found: re.Match[str]) -> str:
    # Of a pile some mark may have gone into the letter.
    return unicodedata.normalize("NFD", found.group())[0]


def _one_script(found: re.Match[str]) -> str:
    word = found.group()
    if word.isascii() or not (_OTHER.search(word) and _LATIN.search(word)):
        return word
    read = unicodedata.normalize("NFD", word).translate(_LOOKS)  # with accents, too
    return _without_marks(unicodedata.normalize("NFC", read))
