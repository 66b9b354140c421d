"""Read an answer that untrusted code returned: which JSON values mean an integer.

One reading serves both the score and the model-only rule, so that no form of an answer passes one and not the
other.
"""

from __future__ import annotations

import re

from pydantic import JsonValue

MAX_DIGITS = 100
_INTEGER = re.compile(r"[+-]?[0-9]+")


def as_integer(answer: JsonValue) -> int | None:
    """The integer that an answer states, or None.

    Accepted: an int; a string that is nothing but an integer, with surrounding blanks and a leading sign
    allowed; a float without a fraction (JSON does not tell 3.0 from 3). Refused: bools, fractions, NaN and
    infinities, lists, any other text ("28.", "1,280", "the answer is 28"), and numbers of over 100 digits.
    """
    if isinstance(answer, bool):
        return None
    if isinstance(answer, int):
        return answer if answer.bit_length() < MAX_DIGITS * 4 else None
    if isinstance(answer, float):
        return int(answer) if answer.is_integer() else None
    if isinstance(answer, str) and len(answer) <= 2 * MAX_DIGITS:
        text = answer.strip()
        if len(text) <= MAX_DIGITS and _INTEGER.fullmatch(text):
            return int(text)
    return None
