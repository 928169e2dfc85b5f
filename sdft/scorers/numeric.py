"""Numbers within texts."""

from __future__ import annotations

import math
import re
from decimal import Decimal, InvalidOperation

from sdft.examples import Example
from sdft.scorers.scorer import Scorer


class NumericMatch(Scorer):
    """1 when the last number of the response equals the last number of the answer, else 0.

    Reads signs, decimals, exponents and thousands separators (`-1,234.50`, `$18`, `#### 72`).
    What stands around a number is not looked at: `5 km`, `5km`, `$5` and `5 %` are all 5.

    Args:
        tolerance: Largest difference that still counts as equal; by default values are compared
            exactly: `72` is `72.00`, but `0.33` is not `1/3`.
        relative_tolerance: The same as a share of the answer's size; the larger of both holds.
        marker: A text that announces the result, as `####` in GSM8K: where it stands in a text, the
            first number behind its last appearance is taken, and that text has none without it.

    Raises:
        ValueError: A tolerance below 0 or infinite, or an empty marker.
    """

    def __init__(
        self,
        tolerance: float = 0.0,
        relative_tolerance: float = 0.0,
        marker: str | None = None,
    ) -> None:
        for name, value in (("tolerance", tolerance), ("relative_tolerance", relative_tolerance)):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"NumericMatch: {name} must be 0 or more, found {value}")
        if marker is not None and not marker.strip():
            raise ValueError("NumericMatch: the marker is empty")
        self.tolerance = tolerance
        self.relative_tolerance = relative_tolerance
        self.marker = marker

    def __call__(self, response: str, example: Example) -> float:
        """Compare the numbers.

        Raises:
            ValueError: The answer of the example has no number.
        """
        answer = self._number(example.answer)
        if answer is None:
            raise ValueError(f"NumericMatch: the answer {example.answer!r} has no number")
        found = self._number(response)
        return float(found is not None and self._close(found, answer))

    def _number(self, text: str) -> Decimal | None:
        if self.marker is None or self.marker not in text:
            return _number(text, -1)
        return _number(text.rpartition(self.marker)[2], 0)

    def _close(self, found: Decimal, answer: Decimal) -> bool:
        if found == answer:
            return True
        if not (self.tolerance or self.relative_tolerance):
            return False
        # Decimals, not floats: 0.3 lies within 0.1 of 0.2.
        relative = Decimal(str(self.relative_tolerance)) * abs(answer)
        try:
            return abs(found - answer) <= max(Decimal(str(self.tolerance)), relative)
        except ArithmeticError:  # an exponent beyond all bounds
            return False


_NUMBER = re.compile(
    r"""(?<!\w)(?<!\d\.)                         # not inside a word, an identifier or a number
        (?P<sign>[-+−]?)[$€£]?
        (?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\.)\.\d+)
        (?P<exponent>(?:[eE][-+]?\d+)?)""",
    re.VERBOSE,
)


def _number(text: str, index: int) -> Decimal | None:
    """The first (0) or the last (-1) number of a text."""
    found = list(_NUMBER.finditer(text))
    if not found:
        return None
    sign, digits, exponent = found[index].group("sign", "digits", "exponent")
    try:
        return Decimal(sign.replace("−", "-") + digits.replace(",", "") + exponent)
    except InvalidOperation:  # an exponent beyond all bounds: no number to compare with
        return None
