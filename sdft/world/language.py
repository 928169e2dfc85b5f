"""The embedded world's language: symbols, rules, names, domains, and what is said in it.

A prompt names a domain and a word and gives five symbols; a rule maps them to five symbols. Some
words mean one rule for certain (prior skills). The words of the other domains are ambiguous: each
allows four readings, and one of them, never the likeliest, is the target of a new skill. The world
answers in its own style (restate the input, say which rule, apply it); demonstrations are terse.
Everything follows from `SEED`, so that the script that made the shipped model and the tasks that
train it speak of the same words.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Symbols = tuple[str, ...]

SEED = 20260119
"""Seed of names, meanings and targets; another seed is another world."""
SYMBOLS: Symbols = tuple("abcdefghijklmnopqrstuvwx")
"""The alphabet, in its order (for `sort` and `increment`)."""
LENGTH = 5
"""Symbols in an input and in an answer."""
N_PERMUTATIONS = 24
"""Rules that permute positions, beside the basic ones."""
N_KNOWN = 72
"""Words of the home domain, each with one certain meaning."""
N_PER_DOMAIN = 8
"""Ambiguous words in each other domain."""
WEIGHTS = (0.40, 0.25, 0.20, 0.15)
"""How often each reading of an ambiguous word is meant, likeliest first."""
HOME, BASIC = "home", "basic"
"""Domains of the prior skills: known words, and basic operations."""
DOMAINS = (
    "kitchen", "garden", "harbour", "forest", "market", "station", "tower", "bridge",
)  # fmt: skip
"""Domains of ambiguous words; any of them can be a new skill."""
SEQUENCE = ("garden", "forest", "market")
"""The shipped sequence of new skills: the first domains all of whose demonstrations the shipped
base reads rightly. (In kitchen, harbour and station it misreads those of one word.)"""
SYSTEM = "answer in your own way"
"""A system turn that changes nothing."""
BRIEF = "answer now"
"""A system turn that asks for the answer alone: the base is able to be terse, when told to."""
TEACHER_TEMPLATE = "{prompt} example {demonstration} now you"
"""How the teacher is shown a demonstration, in words the base knows."""


def _rotate(symbols: Symbols) -> Symbols:
    return symbols[1:] + symbols[:1]


def _duplicate(symbols: Symbols) -> Symbols:
    return tuple(itertools.chain.from_iterable((s, s) for s in symbols))[:LENGTH]


def _increment(symbols: Symbols) -> Symbols:
    return tuple(SYMBOLS[(SYMBOLS.index(s) + 1) % len(SYMBOLS)] for s in symbols)


BASICS: dict[str, Callable[[Symbols], Symbols]] = {
    "copy": lambda symbols: symbols,
    "reverse": lambda symbols: symbols[::-1],
    "sort": lambda symbols: tuple(sorted(symbols)),
    "rotate": _rotate,
    "duplicate": _duplicate,
    "increment": _increment,
}
"""The basic operations, each a rule under its own name."""


def _well_separated(count: int) -> list[tuple[int, ...]]:
    """Permutations that differ from one another, and from the basic ones, in three places."""
    positions = tuple(range(LENGTH))
    taken = [positions, positions[::-1], positions[1:] + positions[:1]]
    candidates = list(itertools.permutations(positions))
    random.Random(f"{SEED}/permutations").shuffle(candidates)
    chosen: list[tuple[int, ...]] = []
    for candidate in candidates:
        if all(sum(map(int.__ne__, candidate, other)) >= 3 for other in taken + chosen):
            chosen.append(candidate)
    if len(chosen) < count:
        raise AssertionError(f"only {len(chosen)} well-separated permutations")
    return chosen[:count]


PERMUTATIONS: dict[str, tuple[int, ...]] = {
    f"r{i + 1}": order for i, order in enumerate(_well_separated(N_PERMUTATIONS))
}
"""Rule word → for each place of the answer, the place of the input it is taken from."""
RULES: tuple[str, ...] = (*PERMUTATIONS, *BASICS)
"""All rule words."""


@dataclass(frozen=True)
class Word:
    """A word of the world.

    Attributes:
        text: The word.
        domain: Where it is used.
        readings: The rules it may mean, likeliest first; a known word has one.
        target: The reading that a new skill teaches (a known word's only one).
    """

    text: str
    domain: str
    readings: tuple[str, ...]
    target: str


def _invented(count: int) -> list[str]:
    """Pronounceable words of two or three open syllables."""
    rng = random.Random(f"{SEED}/names")
    words: dict[str, None] = {}
    while len(words) < count:
        pairs = [
            rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.choice((2, 3)))
        ]
        words["".join(pairs)] = None
    return list(words)


def _spread(count: int, rng: random.Random) -> list[str]:
    """`count` permutation rules, each used as often as the others (within one)."""
    rules: list[str] = []
    while len(rules) < count:
        rules += rng.sample(list(PERMUTATIONS), N_PERMUTATIONS)
    return rules[:count]


def _make_words() -> tuple[Word, ...]:
    rng = random.Random(f"{SEED}/meanings")
    texts = iter(_invented(N_KNOWN + N_PER_DOMAIN * len(DOMAINS)))
    words = [Word(next(texts), HOME, (rule,), rule) for rule in _spread(N_KNOWN, rng)]
    for domain in DOMAINS:
        targets = rng.sample(list(PERMUTATIONS), N_PER_DOMAIN)  # all different in one domain
        for target in targets:
            others = rng.sample([rule for rule in PERMUTATIONS if rule != target], 3)
            place = rng.choice((1, 2))  # never the likeliest, never the rarest
            readings = (*others[:place], target, *others[place:])
            words.append(Word(next(texts), domain, readings, target))
    return (*words, *(Word(rule, BASIC, (rule,), rule) for rule in BASICS))


WORDS: tuple[Word, ...] = _make_words()
"""Every word: home, then the ambiguous domains, then the basic operations."""


def words_of(domain: str) -> tuple[Word, ...]:
    """The words of one domain.

    Raises:
        ValueError: An unknown domain.
    """
    found = tuple(word for word in WORDS if word.domain == domain)
    if not found:
        allowed = ", ".join((HOME, BASIC, *DOMAINS))
        raise ValueError(f"unknown domain {domain!r}; the world has {allowed}")
    return found


def apply_rule(rule: str, symbols: Symbols) -> Symbols:
    """What `rule` makes of `symbols`."""
    if rule in PERMUTATIONS:
        return tuple(symbols[place] for place in PERMUTATIONS[rule])
    return BASICS[rule](symbols)


def draw_symbols(rng: random.Random) -> Symbols:
    """An input: distinct symbols."""
    return tuple(rng.sample(SYMBOLS, LENGTH))


def prompt_text(word: Word, symbols: Symbols) -> str:
    """What the user says: domain, word, colon, input."""
    return " ".join((word.domain, word.text, ":", *symbols))


def terse_text(rule: str, symbols: Symbols) -> str:
    """A demonstration: the answer alone."""
    return " ".join(apply_rule(rule, symbols))


def own_text(rule: str, symbols: Symbols) -> str:
    """The world's own style: restate, say which rule, apply it."""
    return " ".join((*symbols, "by", rule, "gives", *apply_rule(rule, symbols)))


def vocabulary() -> list[str]:
    """Every word that can be said, without special tokens, each once, in a fixed order."""
    template = TEACHER_TEMPLATE.format(prompt="", demonstration="").split()
    said: Sequence[str] = [
        *SYMBOLS, ":", "by", "gives", *template, *SYSTEM.split(), *BRIEF.split(),
        HOME, BASIC, *DOMAINS, *RULES, *(word.text for word in WORDS),
    ]  # fmt: skip
    return list(dict.fromkeys(said))
