"""Values of answers: numbers, choices and words, as they are written and as what they stand for."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Hashable
from fractions import Fraction
from typing import Literal, Protocol

Kind = Literal["number", "choice", "words"]
Span = tuple[int, int]


class ValueKind(Protocol):
    """Finds values of one kind in a text and reads them."""

    def find_after(self, text: str, start: int) -> Span | None:
        """The value right behind ``start``, delimiters in between allowed."""

    def find_last(self, text: str) -> Span | None:
        """The last value anywhere in ``text``."""

    def canonical(self, value: str) -> Hashable | None:
        """What ``value`` stands for; None where it is no value of this kind."""


# What may stand between a marker and its value. Bounded and possessive: no model output may make the search quadratic.
_DELIMITERS = (
    r"""(?:\s|[:*_"'`$€£¥₹(\[{≈]|\\[(\[{,;:!\s$]|US(?=\$)|(?:USD|EUR|GBP|INR|Rs\.?)(?=\s?\d)"""
    r"""|\\(?:boxed|fbox|text(?:bf|it|rm)?|math(?:bf|rm|it)|displaystyle|left|approx)(?![a-zA-Z])"""
    r"""|(?:approximately|about|roughly)(?=\s)){0,40}+"""
)


class Numbers:
    """Integers, decimals, fractions, mixed numbers, powers of ten; compared exactly, as fractions.

    The value is written with its sign, without the currency before it (unless the sign stands further left) and
    without the unit or percent sign behind it: 50 % equals 50. What only begins like a number (5x, 3:30, 4 + 5, 2^10,
    7-8) is none. Numbers of more than `MAX_DIGITS` digits are unreadable.
    """

    MAX_DIGITS = 300

    def find_after(self, text: str, start: int) -> Span | None:
        begin = _LEAD_IN.match(text, start)
        match = _NUMBER.match(text, start if begin is None else begin.end())
        if match is None or _TAIL_OF_MORE.match(text, match.end()) or _read_number(match) is None:
            return None
        return match.span()

    def find_last(self, text: str) -> Span | None:
        matches = list(_NUMBER.finditer(text))
        return next((match.span() for match in reversed(matches) if _read_number(match) is not None), None)

    def canonical(self, value: str) -> Fraction | None:
        span = self.find_after(value, 0)
        match = _NUMBER.match(value, span[0]) if span else None
        return None if match is None else _read_number(match)


class Choices:
    """One of the letters A to D: "B", "(B)", "b)", "option B"; compared without case."""

    def find_after(self, text: str, start: int) -> Span | None:
        match = _CHOICE.match(text, start)
        return None if match is None else match.span("letter")

    def find_last(self, text: str) -> Span | None:
        matches = list(_LONE_LETTER.finditer(text))
        return matches[-1].span("letter") if matches else None

    def canonical(self, value: str) -> str | None:
        span = self.find_after(value, 0)
        return None if span is None else value[slice(*span)].upper()


class Words:
    """All words up to the end of the line or the next tag in angle brackets; compared word by word."""

    def find_after(self, text: str, start: int) -> Span | None:
        match = _WORDS.match(text, start)
        return None if match is None else match.span("words")

    def find_last(self, text: str) -> Span | None:
        return None

    def canonical(self, value: str) -> tuple[str, ...] | None:
        return tuple(value.split()) or None


KINDS: dict[Kind, ValueKind] = {"number": Numbers(), "choice": Choices(), "words": Words()}

# A minus behind a word or a closing bracket subtracts; it is no sign.
_SIGN = r"(?:(?<![\w)\]}])[+\-\u2212\u2013](?! )|(?<![\w)\]}])(?<![\w)\]}] )[+\-\u2212\u2013] )"
_SEPARATOR = r"(?:,|\{,\}|\\,|\\!|[\u00a0\u2009\u202f])"
_INTEGER = rf"(?:[0-9]{{1,3}}(?:{_SEPARATOR}[0-9]{{2,3}})*{_SEPARATOR}[0-9]{{3}}(?![0-9])|[0-9]+)"
_VULGAR = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
_POWER_OF_TEN = r"(?:[eE]|[ ]?(?:\\times|\\cdot|[×x*])[ ]?10\^)\{?(?P<exponent>[+\-\u2212]?[0-9]{1,3})(?![0-9])\}?"
_MAGNITUDES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

_NUMBER = re.compile(
    # Atomic: a number is never cut short to make what follows fit.
    rf"(?>(?:(?P<sign>{_SIGN})(?:\\?[$€£¥₹])?)?"
    rf"(?:(?P<whole>[0-9]+)?[ ]?\\[dtc]?frac[ ]?"
    rf"(?:\{{(?P<top>-?{_INTEGER})\}}[ ]?\{{(?P<bottom>-?{_INTEGER})\}}"
    rf"|(?P<short_top>[0-9])[ ]?(?P<short_bottom>[0-9]))"
    rf"|(?P<vulgar_whole>[0-9]+)?[ ]?(?P<vulgar>[{_VULGAR}])"
    rf"|(?:(?P<mixed>[0-9]+)[ ])?(?P<numerator>{_INTEGER})[ ]?/[ ]?(?P<denominator>[0-9]+)"
    rf"|(?:(?P<integer>{_INTEGER})(?P<decimals>\.[0-9]+)?|(?<![0-9])(?P<bare_decimals>\.[0-9]+))(?:{_POWER_OF_TEN})?"
    rf"(?:[ ](?P<magnitude>{'|'.join(_MAGNITUDES)})\b)?))"
)
# "x =", "5 + 3 =": the value is what the equation comes to.
_OPERATORS = r"(?:[0-9 .,+\-\u2212*/×÷()$%]|\\times|\\cdot|\\div){0,80}?"
_EQUATION = rf"(?:(?:\\?[A-Za-z]|[0-9$]{_OPERATORS})[ ]?={_DELIMITERS}){{0,4}}"
_LEAD_IN = re.compile(_DELIMITERS + "=?" + _DELIMITERS + _EQUATION)
_TAIL_OF_MORE = re.compile(
    r"[ ]?(?:[+×÷/^]|\*(?!\*)|\\(?:times|cdot|div)|[\-−–])[ ]?[(\\$]{0,2}[0-9]"
    r"|\^|:[0-9]|,[0-9]|,[ ]?[0-9.]+[)\]}]|\.[0-9]|[ ][0-9]{3}(?![0-9])"
    r"|[ ]?(?:\\?(?:pi|sqrt)\b|[π√]|[xyzni](?![A-Za-z]))"
)
_CHOICE = re.compile(
    _DELIMITERS
    + r"(?:(?:option|choice|answer|letter)\b)?"
    + _DELIMITERS
    + r"(?P<letter>[A-D](?![\w'’])|[a-d](?=\s*(?:[).,:;*}$\]]|$)))",
)
_LONE_LETTER = re.compile(r"(?<![\w'’])(?P<letter>[B-D]|A(?!\s+[a-z]))(?![\w'’])")
_WORDS = re.compile(r"\s*(?P<words>[^\s<](?:[^\n<]*[^\s<])?)")


def _read_number(match: re.Match[str]) -> Fraction | None:
    """The number a match of `_NUMBER` stands for; None for a zero denominator or too many digits."""
    if match.end() - match.start() > Numbers.MAX_DIGITS:
        return None
    part = match.groupdict()
    if part["vulgar"]:
        value = Fraction(unicodedata.numeric(part["vulgar"])).limit_denominator(10) + int(part["vulgar_whole"] or 0)
    elif top := part["top"] or part["short_top"] or part["numerator"]:
        bottom = _integer(part["bottom"] or part["short_bottom"] or part["denominator"])
        if bottom == 0:
            return None
        value = Fraction(_integer(top), bottom) + int(part["whole"] or part["mixed"] or 0)
    else:
        decimals = part["decimals"] or part["bare_decimals"] or ""
        value = Fraction(f"{_integer(part['integer'] or '0')}{decimals}")
        value *= Fraction(10) ** int((part["exponent"] or "0").replace("\u2212", "-"))
        value *= _MAGNITUDES.get(part["magnitude"] or "", 1)
    return value if (part["sign"] or "+").strip() == "+" else -value


def _integer(text: str) -> int:
    digits = re.sub(r"[^0-9]", "", text)
    return -int(digits) if text.startswith("-") else int(digits)
