"""What may stand around an answer in a text, whatever its kind: delimiters, lead-ins, explanations, second thoughts."""

from __future__ import annotations

import enum
import re
import unicodedata

__all__ = [
    "CODES",
    "CODE_WORDS",
    "CURRENCY",
    "DELIMITERS",
    "EXPLANATION",
    "LEAD_IN",
    "WINDOW",
    "Absent",
    "Span",
    "after",
    "plain",
    "taken_back",
    "why_absent",
]

Span = tuple[int, int]

# An answer and what is looked at around it, in characters: no text can make the search longer than this per marker.
WINDOW = 512


class Absent(enum.Enum):
    """Why no value stands behind an announcement."""

    BLANK = "the text ends"
    REMARK = "the answer is spoken of, not given"
    UNREADABLE = "what stands there is no value of this kind, or more than one"


class _Plain(dict[int, str]):
    """Digits of every script, full-width forms, minus signs and fraction slashes as ASCII, one character for one."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if unicodedata.category(character) == "Nd":
            plain = str(unicodedata.decimal(character))
        else:
            plain = chr(code - 0xFEE0) if 0xFF01 <= code <= 0xFF5E else character
        self[code] = plain
        return plain


_TABLE = _Plain(zip(map(ord, "−–‒‐‑﹣⁻⁄∕٫٬’‘“”«»∗⋅"), "------" + "⁻" + '//.,\'\'""""*·', strict=True))


def plain(text: str) -> str:
    return text if text.isascii() else text.translate(_TABLE)


# What may stand between a marker and its value. Bounded and possessive: no text may make the search quadratic.
CODES = r"(?:USD|EUR|GBP|INR|CAD|AUD|NZD|SGD|HKD|JPY|CNY|RMB|CHF|KRW|BRL|MXN|SEK|NOK|DKK|PLN|CZK|Rs\.?)"
CODE_WORDS = frozenset(re.findall("[A-Z]{3}", CODES))
CURRENCY = r"[$€£¥₹₽₩₺₴₫₱₪฿₦₿¢]"
DELIMITERS = (
    rf"""(?:\s|[:*_"'`(\[{{≈~]|{CURRENCY}|\\[(\[{{,;:!\s$]|(?:US|CA|AU|NZ|HK|[CAR])(?=\$)|{CODES}(?=\s?[+-]?[0-9])"""
    r"""|[\u200b-\u200f\u2060\ufeff]|</?(?:b|i|u|em|strong|code|span|p|answer|ans)>"""
    r"""|\\(?:boxed|fbox|text(?:bf|it|rm)?|math(?:bf|rm|it)|displaystyle|left|approx|quad)(?![a-zA-Z])"""
    r"""|(?:approximately|about|roughly|around|exactly|precisely|simply|just|only|thus|therefore|hence|indeed"""
    r"""|clearly|equal\s+to|a\s+total\s+of)(?=\s)){0,40}+"""
)
# "x =", "5 + 3 =", "profit =": the value is what the equation comes to.
_OPERATORS = r"(?:[0-9 .,+\-*/×÷()$%]|\\times|\\cdot|\\div){0,80}?"
_EQUATION = rf"(?:(?:\\?[A-Za-z]{{1,20}}|[0-9$]{_OPERATORS})[ ]?={DELIMITERS}){{0,4}}"
LEAD_IN = re.compile(DELIMITERS + "=?" + DELIMITERS + _EQUATION)

# Behind the announcement: nothing, or words about the answer that give none.
_BLANK = re.compile(r"(?:\s|</?[|\w]{1,30}>)*\Z")
_REMARK = re.compile(
    r"(?:indeed\s+|really\s+|also\s+)?(?:correct|right|wrong|incorrect|verified|confirmed|consistent|reasonable)\b",
    re.IGNORECASE,
)


EXPLANATION = re.compile(
    r"\s*(?:since|because|as(?!\s+(?:well|many))|which|where|that\s+is|i\.e\.|meaning|given|not|assuming|rather|thus)\b",
    re.IGNORECASE,
)

# Behind the end of the sentence: the value is taken back, or one of several.
_TAKEN_BACK = re.compile(
    r"[\s*_$)\]}(]*(?:(?:or|either|maybe|perhaps|alternatively|possibly)\b(?P<same>[^.\n]{0,80})"
    r"|(?:(?:but|however,?|and|though)\s+)?(?:wait|hmm|oops|sorry|actually|correction|scratch\s+that|no(?=,|\s+wait\b)"
    r"|I\s+mean|I\s+meant|on\s+second\s+thought)\b(?P<more>[^\n]{0,100})"
    r"|(?P<also>(?:(?:but|however,?)\s[^.\n]{0,40}?|(?:it|this|that|(?:the|my)\s+answer)\s+)"
    r"\b(?:could|might|may|should|maybe|perhaps|possibly)\b[^.\n]{0,60}))",
    re.IGNORECASE,
)


def taken_back(window: str, position: int) -> str:
    """The words behind ``position`` that take back what was said; empty where there are none."""
    match = _TAKEN_BACK.match(window, position)
    return "" if match is None else match["same"] or match["more"] or match["also"] or ""


def after(pattern: re.Pattern[str], text: str, start: int) -> int:
    match = pattern.match(text, start)
    return start if match is None else match.end()


def why_absent(window: str, begin: int, *, ends: bool) -> Absent:
    if ends and _BLANK.match(window, begin):
        return Absent.BLANK
    return Absent.REMARK if _REMARK.match(window, begin) else Absent.UNREADABLE
