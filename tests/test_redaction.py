"""What is a secret and what only looks like one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sdft.redaction import (
    HIDDEN,
    check_filled,
    redacted,
    redacted_text,
    redacted_yaml,
    secret_keys,
)

CONFIGS = sorted((Path(__file__).resolve().parent.parent / "configs").rglob("*.yaml"))
HUB = "hf_" + "aBcDeF0123" * 3
KEY = "sk-" + "proj-0123456789abcdef"


@pytest.mark.parametrize(
    "key",
    [
        "api_key",
        "apiKey",
        "OPENAI_API_KEY",
        "api-key",
        "wandb.api_key",
        "password",
        "db_passwd",
        "secret",
        "client_secret",
        "aws_secret_access_key",
        "private_key",
        "token",
        "hf_token",
        "accessToken",
        "tokens",
        "Authorization",
        "credentials",
        "auth",
    ],
)
def test_secret_by_its_key(key: str) -> None:
    assert redacted({key: "swordfish"}) == {key: HIDDEN}
    assert redacted({"a": [{key: "swordfish"}]}) == {"a": [{key: HIDDEN}]}
    assert redacted({key: ["one", "two"]}) == {key: [HIDDEN, HIDDEN]}
    for nothing in (None, "", True, False):
        assert redacted({key: nothing}) == {key: nothing}


def test_whatever_a_secret_is() -> None:
    assert redacted({"password": 1234, "credentials": {"user": "me"}}) == {
        "password": HIDDEN,
        "credentials": HIDDEN,
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_new_tokens", 256),
        ("tokens", 17),
        ("tokens", "17"),
        ("eos_token", "</s>"),
        ("pad_token", "PAD"),
        ("stop_token", "END"),
        ("token", "<|end|>"),
        ("tokenizer", "fast"),
        ("skip_first_tokens", 3),
        ("author", "somebody"),
        ("name", "sk-learn"),
        ("prompt", "my password is *** and 'a': 'b'"),
        ("path", "hf_models/base"),
        ("url", "https://host/path?split=train&page=2"),
        ("url", "ssh://git@host/repository"),
        ("mail", "me@host.org"),
    ],
)
def test_what_only_looks_like_one(key: str, value: Any) -> None:
    assert redacted({key: value}) == {key: value}
    assert secret_keys({key: value}) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (HUB, HIDDEN),
        (f"--token {HUB}, please", f"--token {HIDDEN}, please"),
        (KEY, HIDDEN),
        ("ghp_" + "a1" * 12, HIDDEN),
        ("https://me:swordfish@host/x", f"https://{HIDDEN}@host/x"),
        (f"https://{'a1' * 10}@host/x", f"https://{HIDDEN}@host/x"),
        ("s3://x?a=1&token=swordfish&b=2", f"s3://x?a=1&token={HIDDEN}&b=2"),
        ("Bearer swordfish99", f"Bearer {HIDDEN}"),
        ("Check({'api_key': 'x', 'n': 'y'})", f"Check({{'api_key': '{HIDDEN}', 'n': 'y'}})"),
    ],
)
def test_secret_by_its_form(text: str, shown: str) -> None:
    assert redacted_text(text) == shown
    assert redacted({"anything": [text]}) == {"anything": [shown]}


def test_the_given_value_stays() -> None:
    values = {"a": {"api_key": "x"}, "b": [HUB]}
    redacted(values)
    assert values == {"a": {"api_key": "x"}, "b": [HUB]}
    assert secret_keys(values) == ["a.api_key", "b.0"]


def test_yaml_without_secrets_stays_word_for_word() -> None:
    text = "# a comment\nb: 2\na: {eos_token: </s>}\n"
    assert redacted_yaml(text) == text
    shown = redacted_yaml("# a comment\nb: 2\na: {api_key: x}\n")
    assert yaml.safe_load(shown) == {"b": 2, "a": {"api_key": HIDDEN}}


def test_a_configuration_with_holes_is_refused() -> None:
    for hole in ({"api_key": HIDDEN}, {"x": ["ok", f"https://{HIDDEN}@host"]}):
        with pytest.raises(ValueError, match=r"(api_key|x\.1) is .*give this value anew"):
            check_filled(hole)
    check_filled({"template": "in *** bold ***", "a": None, "b": [1, {"c": "d"}]})


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_our_configurations_hold_none(file: Path) -> None:
    content = yaml.safe_load(file.read_text())
    assert redacted(content) == content
