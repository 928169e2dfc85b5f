import itertools
import random

import pytest

from sdft.world import language


def test_rules_differ_from_one_another_in_at_least_three_places() -> None:
    fixed = [*language.PERMUTATIONS, "copy", "reverse", "rotate"]
    symbols = language.SYMBOLS[: language.LENGTH]
    for one, other in itertools.combinations(fixed, 2):
        pairs = zip(
            language.apply_rule(one, symbols), language.apply_rule(other, symbols), strict=True
        )
        assert sum(a != b for a, b in pairs) >= 3, (one, other)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("copy", "d b x a c"),
        ("reverse", "c a x b d"),
        ("sort", "a b c d x"),
        ("rotate", "b x a c d"),
        ("duplicate", "d d b b x"),
        ("increment", "e c a b d"),
    ],
)
def test_basic_operations(rule: str, expected: str) -> None:
    assert language.terse_text(rule, tuple("dbxac")) == expected


def test_a_rule_always_gives_five_symbols() -> None:
    symbols = language.draw_symbols(random.Random(0))
    for rule in language.RULES:
        answer = language.apply_rule(rule, symbols)
        assert len(answer) == language.LENGTH
        assert set(answer) <= set(language.SYMBOLS)


def test_words_are_unique_and_no_other_token() -> None:
    texts = [word.text for word in language.WORDS if word.domain != language.BASIC]
    assert len(set(texts)) == len(texts)
    assert not set(texts) & {*language.SYMBOLS, *language.RULES, *language.DOMAINS, "by", "gives"}


def test_a_target_is_a_reading_but_never_the_likeliest() -> None:
    assert list(language.WEIGHTS) == sorted(language.WEIGHTS, reverse=True)
    for domain in language.DOMAINS:
        words = language.words_of(domain)
        assert len(words) == language.N_PER_DOMAIN
        for word in words:
            assert len(set(word.readings)) == len(word.readings) == len(language.WEIGHTS)
            assert word.target in word.readings[1:]


def test_no_two_words_of_a_domain_share_a_target() -> None:
    for domain in language.DOMAINS:
        targets = [word.target for word in language.words_of(domain)]
        assert len(set(targets)) == len(targets)


def test_known_words_use_every_permutation_alike() -> None:
    rules = [word.target for word in language.words_of(language.HOME)]
    counts = {rule: rules.count(rule) for rule in language.PERMUTATIONS}
    assert max(counts.values()) - min(counts.values()) <= 1


def test_an_unknown_domain_is_named() -> None:
    with pytest.raises(ValueError, match=r"'attic'.*kitchen"):
        language.words_of("attic")
