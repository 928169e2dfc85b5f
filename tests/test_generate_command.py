"""`python -m sdft generate`: what a model answers, in every way of asking."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CHAT_TEMPLATE, save_model, write_jsonl

from sdft.cli import main
from sdft.decode import DecodeEngine
from sdft.models import ModelSource, eos_token_ids
from sdft.rollout import Sampling

QUICK = ("--max_new_tokens", "5")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("model"), seed=3))


def ask(model: str, *flags: str) -> int | str | None:
    try:
        return main(["generate", "--model", model, *QUICK, *flags])
    except SystemExit as stop:
        return stop.code


def records(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def error(capsys: pytest.CaptureFixture[str]) -> str:
    told = [x for x in capsys.readouterr().err.splitlines() if x.startswith("sdft: error: ")]
    assert len(told) == 1
    return told[0]


def expected(model: str, text: str) -> str:
    """The greedy answer to a prompt as it is encoded."""
    source = ModelSource(model)
    loaded, tokenizer = source.load_model(), source.load_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    ends = eos_token_ids(loaded, tokenizer)
    rollout = DecodeEngine().generate(loaded, [ids], Sampling(5, temperature=0.0), ends, 0)
    return str(tokenizer.decode(rollout.completions()[0], skip_special_tokens=True)).strip()


def test_one_prompt_gives_the_bare_answer(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(model, "--prompt", "a b c") == 0
    assert capsys.readouterr().out == expected(model, "user : a b c assistant :") + "\n"


def test_several_prompts_as_json(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(model, "--prompt", "a b", "--prompt", "c d e f", "--json", "--show_prompt") == 0
    first, second = records(capsys)
    assert first["prompt"] == [{"role": "user", "content": "a b"}]
    assert second["response"] == expected(model, "user : c d e f assistant :")
    assert second["seen"] == "user : c d e f assistant :"
    assert (first["view"], first["truncated"]) == ("student", first["tokens"] == 5)


def test_the_company_changes_no_greedy_answer(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [flag for text in ("a", "b c d e", "f g", "h") for flag in ("--prompt", text)]
    answers = []
    for size in ("1", "3", "16"):
        assert ask(model, *prompts, "--batch_size", size, "--json") == 0
        answers.append([record["response"] for record in records(capsys)])
    assert answers[0] == answers[1] == answers[2]


def test_the_system_turn(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(model, "--prompt", "a", "--system", "b c", "--json", "--show_prompt") == 0
    (record,) = records(capsys)
    assert [message["role"] for message in record["prompt"]] == ["system", "user"]
    assert record["seen"] == "system : b c user : a assistant :"


def test_the_teachers_view(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    template = ["--teacher_template", "{prompt} shown {context} {demonstration} now"]
    shown = ["--demonstration", "c b", "--context", "d", *template]
    assert ask(model, "--prompt", "a b", *shown, "--json", "--show_prompt") == 0
    (record,) = records(capsys)
    assert record["view"] == "teacher"
    assert record["seen"] == "user : a b shown d c b now assistant :"
    assert record["response"] == expected(model, record["seen"])
    assert record["prompt"] == [{"role": "user", "content": "a b"}], "the student's"


def test_the_teachers_view_of_a_context_alone(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(model, "--prompt", "a b", "--context", "d e", "--json", "--show_prompt") == 0
    (record,) = records(capsys)
    assert "d e" in record["seen"]


def test_prompts_from_a_file(
    model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [
        {"prompt": "a b", "demonstration": "b a"},
        {"messages": [{"role": "user", "content": "c"}], "answer": "d"},
        {"prompt": "e", "context": "f"},
    ]
    file = str(write_jsonl(tmp_path / "prompts.jsonl", rows))
    assert ask(model, "--prompts", file, "--json") == 0
    assert [r["prompt"][-1]["content"] for r in records(capsys)] == ["a b", "c", "e"]
    assert ask(model, "--prompts", file, "--json", "--view", "teacher", "--show_prompt") == 0
    seen = [record["seen"] for record in records(capsys)]
    assert "b a" in seen[0]
    assert " d " in seen[1], "the answer stands in for a demonstration, as in training"
    assert " f " in seen[2]


def test_lines_of_the_standard_input(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a b\n\n  c\n"))
    assert ask(model) == 0
    answers = [expected(model, f"user : {text} assistant :") for text in ("a b", "c")]
    assert capsys.readouterr().out == f"> a b\n{answers[0]}\n\n> c\n{answers[1]}\n\n"


def test_a_conversation(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed: Iterator[str] = iter(["a b", "", "c", "/reset", "d"])

    def answer(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", answer)
    assert ask(model, "--json", "--show_prompt") == 0
    first, second, third = records(capsys)
    assert [message["role"] for message in second["prompt"]] == ["user", "assistant", "user"]
    assert second["prompt"][1]["content"] == first["response"]
    assert first["seen"] in second["seen"]
    assert third["seen"] == "user : d assistant :"


def test_what_is_drawn_depends_on_the_seed_alone(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for seed in ("1", "1", "2"):
        assert ask(model, "--prompt", "a b", "--temperature", "3", "--seed", seed, "--json") == 0
        found.append(records(capsys)[0]["response"])
    assert found[0] == found[1] != found[2]


def test_one_token_left_is_greedy(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    greedy = expected(model, "user : a b assistant :")
    for flags in (["--top_k", "1"], ["--top_p", "1e-6"]):
        assert ask(model, "--prompt", "a b", "--temperature", "1", *flags) == 0
        assert capsys.readouterr().out == greedy + "\n"


def test_a_cut_answer_is_told(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(model, "--prompt", "a", "--json") == 0
    (record,) = records(capsys)
    assert ask(model, "--prompt", "a") == 0
    assert ("cut after 5 tokens" in capsys.readouterr().err) == record["truncated"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "a", "--prompts", "b.jsonl"], "give --prompt or --prompts, not both"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--prompt", "a", "--view", "teacher"], "needs a demonstration or a context"),
        (["--prompt", "a", "--view", "student", "--context", "b"], "use --view teacher"),
        (["--prompt", "a " * 124], "has 128 tokens"),
        (["--prompt", "a", "--temperature", "-1"], "temperature must be a finite number"),
        (["--prompt", "a", "--batch_size", "0"], "--batch_size must be at least 1, found 0"),
        (["--prompt", "a", "--device", "abacus"], "device must be auto or a torch device"),
        (["--prompt", "a", "--model", "/nowhere"], "'/nowhere' does not exist"),
        (["--dtype", "int8"], "dtype"),
    ],
)
def test_bad_input(
    model: str, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert ask(model, *flags) == 2
    assert message in error(capsys)


def test_an_empty_standard_input(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert ask(model) == 2
    assert "the standard input is empty" in error(capsys)


def test_the_templates_of_the_tests() -> None:
    assert "assistant :" in CHAT_TEMPLATE
