"""Values of answers: numbers, choices and words, as they are written and as what they stand for.

A value counts only where all that surrounds it is understood: `LEAD_IN` and `_Tail` list what may stand before and
behind a number. Anything else ("10²", "20 or 30", "5x", "18!") makes the answer unreadable: a number is never cut
short, and of two values none is chosen.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Hashable
from fractions import Fraction
from typing import Literal, Protocol

from atmanrl.answer_choices import Choices
from atmanrl.answer_surroundings import (
    CODE_WORDS,
    CODES,
    CURRENCY,
    EXPLANATION,
    LEAD_IN,
    WINDOW,
    Absent,
    Span,
    after,
    plain,
    taken_back,
    why_absent,
)

Kind = Literal["number", "choice", "words"]
# A number and the half-open span that it takes.
_Read = tuple[Fraction, int, int]


class ValueKind(Protocol):
    """Finds values of one kind in a text and reads them."""

    def find_after(self, text: str, start: int) -> Span | Absent:
        """The value right behind ``start``, delimiters in between allowed."""

    def find_last(self, text: str) -> Span | None:
        """The last value anywhere in ``text``; None where it cannot be read."""

    def canonical(self, value: str) -> Hashable | None:
        """What ``value`` stands for; None where it is no value of this kind."""


class Numbers:
    """Integers, decimals, fractions, mixed numbers, powers of ten, thousands to trillions; compared as fractions.

    The value is written with its sign, without the currency before it (unless the sign stands further left, or "m"
    for million needs it) and without the unit or percent sign behind it: 50 % equals 50. Digits and signs of every
    script are read. Numbers of more than `MAX_DIGITS` digits are unreadable.
    """

    MAX_DIGITS = 300

    def find_after(self, text: str, start: int) -> Span | Absent:
        base = max(0, start - 2)
        found = self._read_after(plain(text[base : start + WINDOW]), start - base, ends=start + WINDOW >= len(text))
        return found if isinstance(found, Absent) else (base + found[1], base + found[2])

    def find_last(self, text: str) -> Span | None:
        text = plain(text)
        last = deque(_NUMBER.finditer(text), maxlen=1)
        if not last or _is_part_of_more(last[0]):
            return None
        found = _understood(last[0], ends=True)
        return found and found[1:]

    def canonical(self, value: str) -> Fraction | None:
        found = self._read_after(plain(value[:WINDOW]), 0, ends=len(value) <= WINDOW)
        return None if isinstance(found, Absent) else found[0]

    def _read_after(self, window: str, start: int, *, ends: bool) -> _Read | Absent:
        begin = after(LEAD_IN, window, start)
        match = _NUMBER.match(window, begin)
        if match is None:
            return why_absent(window, begin, ends=ends)
        found = _understood(match, ends=ends)
        return found if found and _balanced(window[start:begin], found[0]) else Absent.UNREADABLE


class Words:
    """All words up to the end of the line or the next tag in angle brackets; compared word by word."""

    def find_after(self, text: str, start: int) -> Span | Absent:
        match = _WORDS.match(text, start)
        return Absent.BLANK if match is None else match.span("words")

    def find_last(self, text: str) -> Span | None:
        return None

    def canonical(self, value: str) -> tuple[str, ...] | None:
        return tuple(value.split()) or None


KINDS: dict[Kind, ValueKind] = {"number": Numbers(), "choice": Choices(), "words": Words()}


# Behind a word or a closing bracket a minus subtracts; before a space it may be a bullet.
_SIGN = r"(?<![\w)\]}])[+-](?![ ])"
# As far as digits and separators go; `_integer` says whether the groups make a number.
_INTEGER = r"[0-9]++(?:(?:[,_]|\{,\}|\\,|\\!|[\u00a0\u2009\u202f]|'(?=[0-9]{3}(?![0-9])))[0-9]++)*+"
_SEPARATORS = re.compile(r"\{,\}|\\,|\\!|[^0-9]")
_VULGAR = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞⅐⅑⅒"
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_EXPONENT = (
    r"(?:[eE](?P<e>[+-]?[0-9]{1,3})(?![0-9])"
    r"|[ ]?(?:\\times|\\cdot|[×x*·])[ ]?10(?:(?:\^|\*\*)(?:\{[ ]?(?P<braced>[+-]?[0-9]{1,3})[ ]?\}"
    r"|(?P<bare>[+-]?[0-9]{1,3})(?![0-9]))|(?P<raised>[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,3})))"
)
_MAGNITUDES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NUMBER = re.compile(
    # Atomic: a number is never cut short to make what follows fit.
    rf"(?>(?:(?P<sign>{_SIGN})(?:\\?{CURRENCY})?)?"
    rf"(?:(?P<whole>[0-9]++)?[ ]?\\[dtc]?frac[ ]?"
    rf"(?:\{{[ ]?(?P<top>-?{_INTEGER})[ ]?\}}[ ]?\{{[ ]?(?P<bottom>-?{_INTEGER})[ ]?\}}"
    rf"|(?P<short_top>[0-9])[ ]?(?P<short_bottom>[0-9]))"
    rf"|(?P<vulgar_whole>[0-9]++)?[ ]?(?P<vulgar>[{_VULGAR}])"
    rf"|(?:(?P<mixed>[0-9]++)[ ])?(?P<numerator>{_INTEGER})[ ]?/[ ]?(?P<denominator>{_INTEGER})"
    rf"|(?:(?P<integer>{_INTEGER})(?P<decimals>\.[0-9]++)?|(?<![0-9])(?P<bare_decimals>\.[0-9]++)){_EXPONENT}?"
    rf"(?:[ -](?P<magnitude>(?i:{'|'.join(_MAGNITUDES)}))(?i:s?)\b)?))"
)
# "10k" and "5M" always, "$5m" and "$5 M" behind a currency: "5 m" are metres.
_SUFFIX = re.compile(r"(?P<gap>[ ]?)(?P<letter>k|K|mm|MM|[mM](?:n|ln|il)?|[bB]n?|[tT]n?)(?![^\W_])")
_SUFFIXES = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_CURRENCY_BEFORE = re.compile(rf"(?:\\?{CURRENCY}|{CODES})[ ]?\Z")

_PART_OF_MORE = re.compile(
    r"(?:[^\W_]|[0-9][.,:/^*'_-]|[^\W\d_][\^*/_-]|(?:sqrt|log|overline|\^)\{|[√±≠≤≥]"
    r"|\b(?:or|minus|negative|times|over|than|least|most|not)\W{0,3})\Z"
)

# What a number may be followed by, piece by piece. Closing delimiters, percent and degrees, in any number:
_MILD = re.compile(
    r"""[*_"'`)\]}$|%°\s\u200b-\u200f\u2060\ufeff\ufe0f\u20e3]|\\[)\],;: %$]"""
    r"""|\\(?:right|quad|qquad|degree)(?![a-zA-Z])"""
    rf"""|{CURRENCY}|\^\{{?\s?\\circ\s?\}}?[CFK]?|(?<=[°º])[CFK]\b"""
    r"""|\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|[mh]box|operatorname)\s?\{"""
)
_END = re.compile(r"\n|。|[.!](?=[*_\"'`)\]}$\\|]{0,8}(?:\s|\Z|<|[A-Z]))|<(?=[/|a-zA-Z])")
_NO_REPEAT = re.compile(r"\s*(?:base|mod|modulo|rounded|rounds)\b", re.IGNORECASE)
_ASIDE = re.compile(r"\(([^()\n]{1,120})\)")
# "and above", "i.e. 18", "which rounds to 18": the number is not the whole value.
_AND_MORE = re.compile(r"and\s+(?:above|up\b|upwards?|counting|more|change|over|beyond|an?\s)", re.IGNORECASE)
_ROUNDED = re.compile(r"[^.\n]{0,40}?\b(?:rounds|rounded|rounding)\b", re.IGNORECASE)
_SAME_AS = re.compile(
    r"[\s,;:—–-]*(?:i\.?\s?e\b\.?|that\s+is|meaning|namely|viz\b\.?)[,:]?\s+"
    r"(?:to\s+say\s+)?(?:about\s+|approximately\s+)?(?=\\?[$€£¥]?[+-]?[0-9])",
    re.IGNORECASE,
)
_COMMA = re.compile(r"[,;:—](?=\s|\Z)|[ ][-–—][ ]|—(?=[^\W\d_])")
_JOINT = re.compile(r"[-/](?=[^\W\d_]|\\(?:text|mathrm))")
_POWER_OF_UNIT = re.compile(r"\^\{?[23]\}?|[²³]")
_LETTER = r"[^\W\d_²³¹\u2070-\u209f\u2150-\u218f\u2460-\u24ff]"
_WORD = re.compile(rf"{_LETTER}+(?:['.]{_LETTER}+)*")
_MORE_DIGITS = re.compile(r"[ ]+[0-9]")
_LIST_DOT = re.compile(r"[.)][ ]+[^\s]")
_LATER_NUMBER = re.compile(rf"{CURRENCY}?[0-9]+(?:[,.][0-9]+)*")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_UNITS = _words(
    """
    m g l L h s kg mg cm mm km mi ft in yd lb oz ml mL dl cl hr min sec hrs lbs kgs mph kph kmh sq cu am pm gal
    pts MB GB TB KB kB kWh ms st nd rd th
    """
)
_ABBREVIATED = _words("ft in lb lbs oz hr hrs min mins sec secs yd")
_SHORT_WORDS = _words("a at by on is as so an us my up to of in it")
_HEDGES = _words(
    """
    or either neither nor maybe perhaps possibly between versus vs if unless otherwise depending least most ish
    oder ou или или sau upward upwards counting doubled halved tripled quadrupled less fewer
    below plus minus divided multiplied squared cubed factorial modulo mod
    """
)
# Before a number that says for how much or how many the value is: "18 dollars for 3 nights".
_PREPOSITIONS = _words("for in after within during per each every by from on at")
_SMALL = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen
"""
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_NAMED: dict[str, Fraction] = {
    **{word: Fraction(number) for number, word in enumerate(_SMALL.split())},
    **{word: Fraction(number) for number, word in zip(range(20, 100, 10), _TENS, strict=True)},
    "half": Fraction(1, 2),
}
_CARDINALS = frozenset(_NAMED)
_SCALES = re.compile(
    r"(?:hundred|thousand|milli(?:on|ard)|mill[oó]n|milh|miljo|miljard|billi|trilli|quadrilli|quintilli|tausend"
    r"|hundert|hundra|hundre|honderd|dozen|dutzend|lakh|crore|score\b|gross\b|grand\b|mil\b|mille\b|mila\b|kilo\b|mega|giga|fold\b"
    r"|тыс|миллион|миллиард|млн|млрд|half|halves|third|quarter|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh"
    r"|twelfth|\w+teenth|\w+tieth|permil|basis\b|bps\b|sqrt|root|log\b|sin\b|cos\b|tan\b|exp\b|pi\b|theta|alpha"
    # Short and long words for thousands, millions and their like in other languages.
    r"|(?:mio|mrd|tsd|mln|mld|bln|trln|tys|tis|tn|bin|mill|bil|bio|tril|thou|ths|thsd|jt|rb|cr|mii|odd)\b|milyon|milyar"
    r"|juta|ribu|ratus|triliun|trilyun|tri[eệ]u|ngh[iì]n|ngàn|tr[aă]m|t[ỷỉ]|tis[ií]c|tusen|tusind|duizend|ezer|tuhat"
    r"|tysi|mili[oóa]|milij|milli[oóaá]|milliers|tisu[cć]|hiljad|хиляд|хиљад|тисяч|мільйон|мільярд|милион|χιλι|εκατομμ|δισεκ"
    r"|ألف|آلاف|الف|مليون|ملايين|مليار|هزار|میلیون|میلیارد|אלף|אלפים|מיליון|מיליארד|हज|लाख|करोड|พัน|หมื่น|แสน|ล้าน"
    r"|[만천억조백십]|[多余餘倍半幾几])"
)
_WORDS = re.compile(r"\s*(?P<words>[^\s<](?:[^\n<]*[^\s<])?)")


def _balanced(lead_in: str, value: Fraction) -> bool:
    """Whether what stands left of an equals sign, where it is one number, is the value: "1/2 = 0.5", not "18 = 20"."""
    for side in lead_in.split("=")[:-1]:
        number = _NUMBER.search(side)
        if number is not None and not re.search(r"[\w+/×÷-]", side[: number.start()] + side[number.end() :]):
            left = _read_number(number)
            if left not in ((value, value / 100, value * 100) if "%" in lead_in else (value,)):
                return False
    return True


def _is_part_of_more(match: re.Match[str]) -> bool:
    before = match.string[max(0, match.start() - 16) : match.start()]
    return _PART_OF_MORE.search(before) is not None and _CURRENCY_BEFORE.search(before) is None


def _understood(match: re.Match[str], *, ends: bool) -> _Read | None:
    """The number of a match of `_NUMBER`, if it, and what stands around it, is understood."""
    scaled = _scaled(match)
    if scaled is None or _is_list_item(match):
        return None
    value, _, end = scaled
    window = match.string[: end + WINDOW]
    tail = _Tail(window, end, value, ends=ends and len(window) == len(match.string))
    return scaled if tail.is_understood() else None


def _is_list_item(match: re.Match[str]) -> bool:
    """Whether the number counts lines: "1. Eggs" with "2." below it."""
    text, begin, end = match.string, match.start(), match.end()
    line = text[max(0, begin - 8) : begin].rpartition("\n")
    if line[2].strip(" *_") or not (line[1] or begin < 8) or not match[0].isdecimal() or len(match[0]) > 2:
        return False
    if not _LIST_DOT.match(text, end):
        return False
    rest = text[end : end + WINDOW]
    return re.search(rf"\n[ *_]*{int(match[0]) + 1}[.)][ ]", rest) is not None or (
        int(match[0]) > 1
        and re.search(rf"(?:\A|\n)[ *_]*{int(match[0]) - 1}[.)][ ]", text[max(0, begin - WINDOW) : begin]) is not None
    )


def _scaled(match: re.Match[str]) -> _Read | None:
    """The number of a match of `_NUMBER` with a suffix such as k, and the span it takes; None if unreadable."""
    value = _read_number(match)
    if value is None:
        return None
    text, (begin, end) = match.string, match.span()
    suffix = _SUFFIX.match(text, end)
    if suffix is None or match["magnitude"] or match["integer"] is None or match["e"]:
        return value, begin, end
    if suffix["letter"] in ("mm", "MM"):
        return (value, begin, end) if _has_currency(match) is None else None
    letter, factor = suffix["letter"], _SUFFIXES[suffix["letter"][0].lower()]
    if not suffix["gap"] and (letter[0] in "kKMBT" or letter in ("bn", "mn", "mln", "tn")):
        return value * factor, begin, suffix.end()
    if (start := _has_currency(match)) is not None:
        return value * factor, start, suffix.end()
    return value, begin, end


def _has_currency(match: re.Match[str]) -> int | None:
    """Where the currency before a number or behind its sign begins, or the sign; None without."""
    if re.search(CURRENCY, match[0]):
        return match.start()
    before = _CURRENCY_BEFORE.search(match.string, max(0, match.start() - 6), match.start())
    return None if before is None else before.start()


def _read_number(match: re.Match[str]) -> Fraction | None:
    """The number a match of `_NUMBER` stands for; None for digits in no known groups, too many, or over zero."""
    if match.end() - match.start() > Numbers.MAX_DIGITS:
        return None
    part = match.groupdict()
    if part["vulgar"]:
        value = Fraction(unicodedata.numeric(part["vulgar"])).limit_denominator(10) + int(part["vulgar_whole"] or 0)
    elif written := part["top"] or part["short_top"] or part["numerator"]:
        top, bottom = _integer(written), _integer(part["bottom"] or part["short_bottom"] or part["denominator"])
        if top is None or not bottom:
            return None
        value = Fraction(top, bottom) + int(part["whole"] or part["mixed"] or 0)
    else:
        whole = _integer(part["integer"] or "0")
        if whole is None:
            return None
        value = Fraction(f"{whole}{part['decimals'] or part['bare_decimals'] or ''}")
        power = part["e"] or part["braced"] or part["bare"] or (part["raised"] or "0").translate(_SUPERSCRIPTS)
        value *= Fraction(10) ** int(power)
        value *= _MAGNITUDES.get((part["magnitude"] or "").lower(), 1)
    return -value if (part["sign"] or "").strip() == "-" else value


def _integer(text: str) -> int | None:
    """Digits in groups of three, or of two and at last three as in India, between equal separators; else None."""
    digits = text.removeprefix("-")
    first, *groups = _SEPARATORS.split(digits)
    if groups:
        if first.startswith("0"):
            return None
        three = len(first) <= 3 and all(len(group) == 3 for group in groups)
        two = len(first) <= 2 and len(groups[-1]) == 3 and all(len(group) == 2 for group in groups[:-1])
        if len(set(_SEPARATORS.findall(digits))) > 1 or not (three or two):
            return None
    value = int("".join((first, *groups)))
    return value if digits == text else -value


class _Tail:
    """What follows a number up to the end of its sentence; understood where it adds nothing to the value."""

    def __init__(self, window: str, start: int, value: Fraction, *, ends: bool) -> None:
        self.window, self.start, self.value, self.ends = window, start, value, ends
        self.words: list[str] = []

    def is_understood(self) -> bool:
        position = self.start
        while position < len(self.window):
            if end := _END.match(self.window, position):
                # "18!" may be a factorial, "18..." a number that goes on.
                shouted = self.window[position] == "!" and position == self.start
                return not (shouted or self._goes_on(position) or self._taken_back(end.end()))
            if comma := _COMMA.match(self.window, position):
                if EXPLANATION.match(self.window, comma.end()):
                    return not self._renamed(position)
                position = comma.end()
            elif aside := _ASIDE.match(self.window, position):
                if not self._repeats(aside[1]):
                    return False
                position = aside.end()
            elif piece := self._piece(position):
                position = piece
            else:
                return False
        return self.ends

    def _piece(self, position: int) -> int | None:
        """Where the delimiter, unit or word at ``position`` ends; None if there is none that may stand there."""
        for pattern in (_MILD, _JOINT):
            if match := pattern.match(self.window, position):
                return match.end()
        if self.words and (match := _POWER_OF_UNIT.match(self.window, position)):
            return match.end()
        if match := _WORD.match(self.window, position):
            if _AND_MORE.match(self.window, position) or self._renamed(position):
                return None
            if match[0] == "or" and (same := self._same_again(match.end())):
                return same
            if not self._word(match[0], attached=position == self.start):
                return None
            self.words.append(match[0].lower())
            return match.end()
        if (match := _LATER_NUMBER.match(self.window, position)) and self._counts_something_else():
            return match.end()
        return position + 1 if unicodedata.category(self.window[position]) == "So" else None

    def _word(self, word: str, *, attached: bool) -> bool:
        """Whether a word is a unit, or one that changes no number."""
        lower = word.lower()
        if lower in _HEDGES or any(unicodedata.numeric(character, None) is not None for character in word):
            return False
        if self.words:
            return (lower not in _CARDINALS and not _SCALES.match(lower)) or self._counts_something_else()
        if lower in _CARDINALS or _SCALES.match(lower):
            return False
        if word in _UNITS or word in CODE_WORDS:
            return True
        if not word.isascii():
            # π and its like multiply.
            return len(word) > 1 or not "Ͱ" <= word <= "Ͽ"
        if attached:
            return len(word) > 3
        return len(word) > 2 or lower in _SHORT_WORDS

    def _counts_something_else(self) -> bool:
        return len(self.words) > 1 and self.words[-1] in _PREPOSITIONS

    def _repeats(self, aside: str) -> bool:
        """Whether what stands in brackets gives no other value for the same: "(or 0.2)" behind 20%, "(26 weeks)"."""
        number = _NUMBER.search(aside)
        if _NO_REPEAT.match(aside):
            return False
        hedges = (
            re.search(r"\b(?:or|oder|ou|maybe|perhaps|possibly)\b|[或又및]|또는|または", aside, re.IGNORECASE)
            is not None
        )
        if number is None:
            said = re.findall(r"[a-z]+", aside.lower())
            named = sum(_NAMED.get(word, 0) for word in said) == self.value
            return not hedges and (not _CARDINALS.issuperset(said) or named or not said)
        found = _read_number(number)
        before = _SAME_AS.sub("", aside[: number.end()])[: -len(number[0])]
        alone = not re.search(r"[^\W\d_]", before + aside[number.end() :])
        return not (hedges or alone) or found in (self.value, self.value / 100, self.value * 100)

    def _same_again(self, position: int) -> int | None:
        # "3/4 or 0.75" is one value.
        number = _NUMBER.match(self.window, after(LEAD_IN, self.window, position))
        scaled = None if number is None else _scaled(number)
        return scaled[2] if scaled is not None and scaled[0] == self.value else None

    def _goes_on(self, position: int) -> bool:
        """Whether the full stop at ``position`` belongs to the number ("18. 5") or to a unit with more ("5 ft. 6")."""
        short = position == self.start or (bool(self.words) and self.words[-1] in _ABBREVIATED)
        return self.window[position] == "." and short and _MORE_DIGITS.match(self.window, position + 1) is not None

    def _renamed(self, position: int) -> bool:
        """Whether another number follows for the same value: "17.6, which rounds to 18", "17.6 i.e. 18"."""
        if match := _SAME_AS.match(self.window, position):
            return self._same_again(match.end()) is None
        return bool(_COMMA.match(self.window, position)) and _ROUNDED.match(self.window, position) is not None

    def _taken_back(self, position: int) -> bool:
        number = _NUMBER.search(taken_back(self.window, position))
        return number is not None and _read_number(number) != self.value
