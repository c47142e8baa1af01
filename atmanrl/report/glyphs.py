"""Token text that shows what it holds and cannot rearrange or hide its surroundings."""

from __future__ import annotations

import unicodedata

_NAMED = {"\n": "↵\n", "\t": "⇥\t"}
# Control, format (bidi overrides, zero-width), private-use, surrogate and unassigned characters, line separators.
_INVISIBLE = {"Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp"}
# Joiners inside emoji sequences and scripts that need them are harmless and change the shape of real words.
_JOINERS = {"\u200c", "\u200d"}


def visible(text: str) -> str:
    """``text`` with newlines and tabs marked and every other invisible character written as ⟨U+202E⟩.

    A space alone becomes ␣, and a token that completes no character becomes ◌.
    """
    if not text:
        return "◌"
    if text.isspace() and "\n" not in text and "\t" not in text:
        return "␣" * len(text)
    return "".join(_visible_character(character) for character in text)


def _visible_character(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    if character in _JOINERS or unicodedata.category(character) not in _INVISIBLE:
        return character
    return f"⟨U+{ord(character):04X}⟩"
