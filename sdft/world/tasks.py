"""Tasks of the embedded world: new skills to learn in sequence, and prior suites to keep.

A new skill is one domain of ambiguous words: each word allows four readings, of which the base
draws one, and the skill settles each word's own target. Demonstrations are terse (the answer
alone), while the base answers in its own style; the scorer takes either.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Literal

from sdft.examples import Example
from sdft.tasks import Split, Task
from sdft.world import language

SPLITS: tuple[Split, ...] = ("test", "validation", "train")
"""Order in which inputs are drawn: the size of a later split never changes an earlier one."""
SUITES: dict[str, str] = {"named": language.HOME, "basic": language.BASIC}
"""Kind of prior suite → its domain: words with one certain meaning, or basic operations."""


class WorldScorer:
    """1 when a response ends with the answer, in the world's own style or terse, else 0."""

    def __call__(self, response: str, example: Example) -> float:
        """Compare what follows the last `gives` (all of it when nobody says so) with the answer."""
        words = response.split()
        if "gives" in words:
            words = words[len(words) - words[::-1].index("gives") :]
        return float(words[-language.LENGTH :] == example.answer.split())


class WorldSkill(Task):
    """A new skill: the ambiguous words of one domain, each with its own target reading.

    Args:
        domain: One of the ambiguous domains: kitchen, garden, harbour, forest, market,
            station, tower, bridge.
        name: Name of the task; the domain when not given.
        train_size: Number of training examples.
        validation_size: Number of validation examples.
        test_size: Number of test examples.
        seed: Draws the inputs; the words and their targets stay the same.
        steps: Optimizer steps spent on the task; exclusive with `epochs`.
        epochs: Passes over the training examples; exclusive with `steps`.

    Raises:
        ValueError: An unknown domain, or a size below 0 or too large.
    """

    def __init__(
        self,
        domain: str,
        name: str | None = None,
        train_size: int = 4096,
        validation_size: int = 64,
        test_size: int = 128,
        seed: int = 0,
        steps: int | None = None,
        epochs: int | None = None,
    ) -> None:
        if domain not in language.DOMAINS:
            allowed = ", ".join(language.DOMAINS)
            raise ValueError(f"domain: found {domain!r}, allowed are {allowed}")
        super().__init__(name or domain, WorldScorer(), steps, epochs)
        self.domain = domain
        sizes = {"train": train_size, "validation": validation_size, "test": test_size}
        self._examples = _draw_splits(domain, sizes, seed)

    def examples(self, split: Split) -> Sequence[Example]:
        """The examples of one split; no input stands in two of them."""
        return self._examples[_checked(split)]


class WorldSuite(Task):
    """A prior suite: what the base knows for certain.

    As a suite it is only ever evaluated; in `data.general` its training prompts serve methods that
    distil the base's behaviour.

    Args:
        kind: `named` (words with one certain meaning) or `basic` (copy, reverse, sort, rotate,
            duplicate, increment).
        name: Name of the suite; the kind when not given.
        test_size: Number of test examples.
        validation_size: Number of validation examples.
        train_size: Number of training examples.
        seed: Draws the inputs.

    Raises:
        ValueError: An unknown kind, or a size below 0 or too large.
    """

    def __init__(
        self,
        kind: Literal["named", "basic"],
        name: str | None = None,
        test_size: int = 144,
        validation_size: int = 72,
        train_size: int = 512,
        seed: int = 0,
    ) -> None:
        if kind not in SUITES:
            raise ValueError(f"kind: found {kind!r}, allowed are {', '.join(SUITES)}")
        super().__init__(name or kind, WorldScorer())
        self.kind = kind
        sizes = {"test": test_size, "validation": validation_size, "train": train_size}
        self._examples = _draw_splits(SUITES[kind], sizes, seed)

    def examples(self, split: Split) -> Sequence[Example]:
        """The examples of one split; no input stands in two of them."""
        return self._examples[_checked(split)]


def _checked(split: Split) -> Split:
    if split not in SPLITS:
        raise ValueError(f"split: found {split!r}, allowed are {', '.join(SPLITS)}")
    return split


def _draw_splits(domain: str, sizes: dict[str, int], seed: int) -> dict[Split, tuple[Example, ...]]:
    """Examples of each split, from inputs that are all different."""
    limit = 1_000_000  # far below the 5.1 million inputs there are, so that drawing stays quick
    for split, size in sizes.items():
        if not 0 <= size <= limit:
            raise ValueError(f"{split}_size: found {size}, allowed are 0 to {limit}")
    inputs = _distinct_symbols(random.Random(f"{language.SEED}/tasks/{domain}/{seed}"))
    words = language.words_of(domain)
    return {
        split: tuple(_example(words[i % len(words)], next(inputs)) for i in range(sizes[split]))
        for split in SPLITS
        if split in sizes
    }


def _distinct_symbols(rng: random.Random) -> Iterator[language.Symbols]:
    seen: set[language.Symbols] = set()
    while True:
        symbols = language.draw_symbols(rng)
        if symbols not in seen:
            seen.add(symbols)
            yield symbols


def _example(word: language.Word, symbols: language.Symbols) -> Example:
    answer = language.terse_text(word.target, symbols)
    prompt = language.prompt_text(word, symbols)
    return Example(({"role": "user", "content": prompt},), answer, demonstration=answer)
