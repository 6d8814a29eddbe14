r"""One notation for short answers: `10\,080`, `€20`, `30^\circ` and `2 3/4` become `10080`, `20`, `30`, `2\frac{3}{4}`.

Pure and linear in the text's length.
"""

from __future__ import annotations

import re
from collections import deque
from decimal import Decimal
from fractions import Fraction

LONGEST = 2000
"""Longest answer (characters) that is read and compared; the longest of the MATH test set has 81."""

_TEXT = r"\\(?:text|textrm|textbf|mathrm|mbox|operatorname)"
_COMMANDS = ("times", "div", "cdot", "cup", "pi", "infty", "leq", "geq", "neq", "emptyset")
_CHARACTERS = str.maketrans(
    dict(
        zip("\u2212\u2026º²³√\xa0\u2007\u2009\u202f", ("-", "...", "°", "^{2}", "^{3}", r"\sqrt", *"~~~~"), strict=True)
    )
    | dict(zip("\u00d7÷·\u222aπ∞≤≥≠∅", (rf"\{command} " for command in _COMMANDS), strict=True))
    | dict(zip("½⅓⅔¼¾", (rf"\frac{{{a}}}{{{b}}}" for a, b in ("12", "13", "23", "14", "34")), strict=True))
)
_SPELLINGS = [
    (re.compile(pattern, re.ASCII), written)
    for pattern, written in (
        (r"(?<=[0-9])(?:\\[,;:! ]|\\thinspace ?|~)(?=[0-9]{3}(?![0-9]))|\\!", ""),
        (r"(?<=[0-9]) (?=(?:[0-9]{3} )*[0-9]{3}(?:\.[0-9]+)?$)", ""),
        (r"(?<!\\)\\\\ ?\[ ?-?[0-9.]+ ?(?:pt|em|ex|mm|cm|in|mu) ?\]", r"\\\\"),  # the distance between two rows
        (r"US(?=\\?\$ ?[0-9])|[€£¥₹]|\\(?:text)?(?:euro|pounds|sterling|yen)(?![A-Za-z])(?:\{\})? ?", ""),
        (rf"\b(?:USD|EUR|GBP|JPY|INR|CHF|CAD|AUD)\b|{_TEXT} ?\{{ ?(?:USD|EUR|GBP)? ?\}}", ""),
        (r"(?<!\\)\\[,;:> ]|~|\\thinspace(?![A-Za-z])", " "),
        (rf" ?(?:\\?%|{_TEXT} ?\{{ ?(?:\\?%|percent) ?\}}|\bpercent\b)", r"\\%"),
        (r" ?(?:\{\})?(?:\^ ?\{? ?\\circ ?\}?|\\(?:text)?degrees?(?![A-Za-z])|°)", "°"),
        (rf"° ?(?:[CF]\b|{_TEXT}\{{ ?[CF] ?\}})?", ""),
        (r"\\varnothing|(?:\\left ?)?\\\{ ?(?:\\right ?)?\\\}", r"\\emptyset"),
        (r"\{,\}", ","),
        # 1.6e-19, 1e9 and 12e10, but 3e-2 is 3 times Euler's number less 2.
        (
            r"(?<![A-Za-z0-9.])(1|[0-9]+\.[0-9]+|[0-9]+(?=[eE][-+]?[0-9]{2}))[eE]\+?(-?[0-9]{1,3})(?![0-9A-Za-z.])",
            r"\1 \\times 10^{\2}",
        ),
    )
]
_MIXED = re.compile(  # 2 3/4, 2\frac{3}{4}, 2\tfrac34
    r"(?<![0-9.,/^_}\\])([0-9]{1,99}) ?(?:(?<= )([0-9]{1,99}) ?/ ?([0-9]{1,99})(?![0-9/.])"
    r"|\\[cdt]?frac ?(?:([1-9])([1-9])|\{ ?([0-9]{1,99}) ?\} ?\{ ?([0-9]{1,99}) ?\}))"
)
_REPEATING = re.compile(
    r"(?<![0-9.])([0-9]{0,99})\.([0-9]{0,99})"
    r"(?:(?:\\(?:overline|bar|dot) ?\{?|\()([0-9]{1,99})[})]?(?:([0-9]{0,99})\\dot ?\{?([0-9])\}?)?"
    r"| ?(?:\.\.\.|\\[lc]?dots(?![A-Za-z])))"
)
_PERIOD = re.compile(r"([0-9]{2,12})\1$|([0-9])\2\2$")
_DELIMITERS = re.compile(r"(?<!\\)\\[()\[\]]|\\?\$|(?<![0-9A-Za-z)])\*\*|\*\*(?![0-9A-Za-z(])")
_UNIT = re.compile(
    rf"(?<=[0-9}}%]) ?(?:{_TEXT} ?\{{[^{{}}]*\}}|(?!(?:hundred|[a-z]*thousand|[mb]illion|dozen)\b)"
    r"(?=[a-z]{2,}(?![a-z]))(?:[a-z]*[aeiou][a-z]*|[ckm]?m|kg|ft|lbs?|hrs?|mph)(?: [a-z]+)*)"
    r"(?:\^ ?\{?-?[0-9]\}?)?(?:/[a-z]+)?$"
)
# A sign counts only where it cannot be a minus between two things ("3-4" ends in 4). ASCII digits only.
_NUMBER = re.compile(
    r"(?:(?<![0-9A-Za-z)\]}])[-+])?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}(?![0-9A-Za-z]))?"
)
_POWER_OF_TEN = re.compile(r"(?<=[0-9]) ?\\(?:times|cdot) ?10 ?\^ ?\{? ?\+?(-?[0-9]{1,3}) ?\}?(?![0-9])")
_SHAPES = [
    (re.compile(pattern), written)
    for pattern, written in (
        # A space matters only between two letters or digits: "x = 3" is "x=3", but "1 2" is not "12".
        (r"(?<![0-9A-Za-z]) | (?![0-9A-Za-z])|\\(?:left|right|displaystyle)(?![A-Za-z])", ""),
        (r"\\[cdt]frac", r"\\frac"),
        (r"\\frac([0-9])([0-9])", r"\\frac{\1}{\2}"),
        (r"^(-?)\\frac\{([0-9]+)\}\{([0-9]+)\}$", r"\1\2/\3"),
        (rf"^{_TEXT}\{{([^{{}}]*)\}}$", r"\1"),
    )
]


def spelled(text: str) -> str:
    """`text` with numbers, units of money and angle, and symbols written in one way; delimiters of formulas stay."""
    text = " ".join(text.translate(_CHARACTERS).split())
    for pattern, written in _SPELLINGS:
        text = pattern.sub(written, text)
    return _REPEATING.sub(_decimal, _MIXED.sub(_improper, text))


def plain(text: str) -> str:
    """An answer as it is compared: `spelled`, without delimiters of formulas and the full stop at its end."""
    if len(text) > LONGEST:
        return text
    # A backslash at the end (of "\\ ") would escape the dollar that closes the formula.
    text = _DELIMITERS.sub("", spelled(text)).strip().rstrip("\\ ")
    return text if text.endswith("..") else text.removesuffix(".").strip()


def without_unit(text: str) -> str:
    r"""A plain answer without the unit behind its value, `\text{ cm}^2` or `dollars`."""
    return _UNIT.sub("", text) if len(text) <= LONGEST else text


def canonical(text: str) -> str:
    """A plain answer as equal ones mostly share it: for votes, and for what is the same without any computing."""
    number = whole_number(text)
    if number is not None:
        digits = f"{number:f}" if number else "0"
        return digits.rstrip("0").rstrip(".") if "." in digits else digits
    for pattern, written in _SHAPES:
        text = pattern.sub(written, text)
    return text


def whole_number(text: str) -> Decimal | None:
    """The number that a plain answer is as a whole, or None."""
    match = _NUMBER.fullmatch(_POWER_OF_TEN.sub(r"e\1", text))
    return None if match is None else Decimal(match[0].replace(",", ""))


def last_number(text: str) -> Decimal | None:
    """The last number that is written in a plain text, or None."""
    match = deque(_NUMBER.finditer(_POWER_OF_TEN.sub(r"e\1", text)), maxlen=1)
    return Decimal(match[0][0].replace(",", "")) if match else None


def _improper(match: re.Match[str]) -> str:
    whole, above, below = (int(part) for part in match.groups() if part)
    return rf"\frac{{{whole * below + above}}}{{{below}}}" if 0 < above < below else match[0]


def _decimal(match: re.Match[str]) -> str:
    """A repeating decimal: a fraction where its period is clear, else (`2.718281828...`) a decimal of more digits."""
    whole, fixed, first, middle, last = (part or "" for part in match.groups())
    repeated = _PERIOD.search(fixed[-40:])
    if not first and repeated:
        first = repeated[2] or ""
    if first:
        period = first + middle + last
        scale = 10 ** len(fixed)
        value = Fraction(int(whole + fixed + period) - int(whole + fixed or 0), scale * (10 ** len(period) - 1))
        return rf"\frac{{{value.numerator}}}{{{value.denominator}}}" if value.denominator > 1 else str(value)
    return f"{whole or 0}.{fixed}{repeated[1] * 10 if repeated else ''}"
