"""Answers found by their form: a regular expression, the letter of a choice."""

from __future__ import annotations

import re

from sdft.examples import Example
from sdft.scorers.scorer import Scorer


class RegexMatch(Scorer):
    """1 when what a pattern finds last in the response is exactly the answer, else 0.

    Args:
        pattern: A Python regular expression. Its first group is compared with the answer, or the
            whole match when it has no group. Matches of no characters are ignored.

    Raises:
        ValueError: The pattern is empty or not a regular expression.
    """

    def __init__(self, pattern: str) -> None:
        if not pattern:
            raise ValueError("RegexMatch: the pattern is empty")
        try:
            self._compiled = re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"RegexMatch: the pattern {pattern!r} is not a regular expression: {error}"
            ) from error
        self.pattern = pattern

    def __call__(self, response: str, example: Example) -> float:
        """Compare the last match with the answer as it is."""
        found = [match for match in self._compiled.finditer(response) if match.group()]
        group = min(self._compiled.groups, 1)
        return float(bool(found) and found[-1].group(group) == example.answer)


class LetterMatch(Scorer):
    """1 when the response chooses the answer's letter, else 0.

    The letter is read from the last `<answer>…</answer>`, as the paper's science task asks for it
    (arXiv 2601.19897): alone there, or first and set off (`B`, `(b)`, `**B**`, `B: 337.310`). A tag
    that the length limit left open counts; what stands outside is not looked at.

    Args:
        letters: The letters that can be chosen.
        tag: The name of the tag.
        anywhere: Where there is no such tag, take the letter that the response names last in words
            ("the answer is (B)", `\\boxed{B}`) or that stands alone on its last line. A model that
            was never asked for tags needs it; the paper's figures are without.

    Raises:
        ValueError: Letters that are no letters or repeat, or a tag that is no word.
    """

    def __init__(self, letters: str = "ABCD", tag: str = "answer", anywhere: bool = False) -> None:
        if not letters.isalpha() or len(set(letters.upper())) < len(letters):
            raise ValueError(
                f"LetterMatch: letters must be different letters in one word, found {letters!r}"
            )
        if not re.fullmatch(r"[\w-]+", tag):
            raise ValueError(f"LetterMatch: tag must be a word, found {tag!r}")
        self.letters = letters.upper()
        self.tag = tag
        self.anywhere = anywhere

    def __call__(self, response: str, example: Example) -> float:
        """Compare the letters.

        Raises:
            ValueError: The answer of the example is none of the letters.
        """
        return float(self.explain(response, example) is None)

    def explain(self, response: str, example: Example) -> str | None:
        """The letter that was found in place of the right one; None where it is right."""
        wanted = example.answer.strip().upper()
        if len(wanted) != 1 or wanted not in self.letters:
            raise ValueError(
                f"LetterMatch: the answer must be one of {self.letters}, found {example.answer!r}"
            )
        found = self.letter(response)
        if found is None:
            return f"no letter in <{self.tag}>"
        return None if found == wanted else f"chose {found}, not {wanted}"

    def letter(self, response: str) -> str | None:
        """The letter that a response chooses; None where it chooses none."""
        _, opened, rest = response.rpartition(f"<{self.tag}>")
        if opened:
            return self._alone(rest.partition(f"</{self.tag}>")[0])
        return self._named(response) if self.anywhere else None

    def _alone(self, text: str) -> str | None:
        found = re.match(rf"[\s*(\[{{\"'`]*([{self.letters}])(?!\w)", text, re.IGNORECASE)
        if not found:
            return None
        rest = text[found.end() :]
        # "A molecule" begins with an article, "A: a molecule" with a letter that is set off.
        ends = re.match(r"[\s*)\]}\"'`.]*(?:$|[:,;\n])|[*)\]}:.]", rest)
        return found[1].upper() if ends else None

    def _named(self, response: str) -> str | None:
        letter = rf"[*(\[{{]*\b([{self.letters}])\b"
        words = rf"(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*{letter}|\\boxed\{{\s*{letter}"
        found = list(re.finditer(words, response))
        if found:
            return found[-1][1] or found[-1][2]
        last = (response.strip().splitlines() or [""])[-1]
        return self._alone(last) if len(last) < 10 else None
