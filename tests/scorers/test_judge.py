"""The judge: three levels, nothing asked twice, nothing scored that was not judged."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import FakeEndpoint, Said

from sdft.evaluation import Artifacts, Response, summarise
from sdft.examples import Example, as_messages
from sdft.scorers import ChatEndpoint, Judge, JudgeError, LocalJudge
from sdft.scorers.verdicts import Verdict, read_verdict
from sdft.stores import describe
from sdft.tasks import PythonTask

KEY = "swordfish-0123456789"  # nothing in its form says that it is a secret
ANSWERS = ["right", "half", "wrong", ""]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def examples(count: int = 4) -> list[Example]:
    return [Example(as_messages(f"question {i}"), f"answer {i}") for i in range(count)]


def by_response(number: int, body: dict[str, Any]) -> Said:
    """Grades by the word that the response consists of."""
    prompt = body["messages"][0]["content"]
    grades = {"right": "CORRECT", "half": "PARTIAL", "wrong": "INCORRECT"}
    (grade,) = [g for word, g in grades.items() if f"\n{word}" in prompt]
    return f"It says so.\nGrade: {grade}"


def judge(endpoint: FakeEndpoint, cache: str | None = "cache", **options: Any) -> Judge:
    own = {key: options.pop(key) for key in ("score", "rounds", "template") if key in options}
    settings = {"backoff_s": 0.001, **options}
    return Judge(ChatEndpoint(endpoint.url, "m", **settings), cache=cache, **own)


@pytest.mark.parametrize(
    ("score", "expected"),
    [("strict", [1, 0, 0, 0]), ("lenient", [1, 1, 0, 0]), ("graded", [1, 0.5, 0, 0])],
)
def test_three_levels(score: str, expected: list[float]) -> None:
    with FakeEndpoint(by_response) as endpoint:
        found = judge(endpoint, score=score)
        assert found.score_all(ANSWERS, examples()) == expected
        details = found.details(ANSWERS, examples())
        assert details == {"strict": [1, 0, 0, 0], "lenient": [1, 1, 0, 0]}
        assert found.explain("half", examples()[1]) == "judged partial"
        assert found("right", examples()[0]) == 1.0
    assert len(endpoint.requests) == 3  # an empty response is not worth a call


def test_the_prompt_holds_question_answer_and_response_as_they_are() -> None:
    with FakeEndpoint(lambda n, body: "Grade: CORRECT") as endpoint:
        example = Example(as_messages("why {response}?"), "for {question}")
        judge(endpoint)("{answer} {x}", example)
    (message,) = endpoint.requests[0]["messages"]
    assert message["role"] == "user"
    for part in ("why {response}?", "for {question}", "{answer} {x}"):
        assert f"\n{part}\n" in message["content"]
    assert {k: endpoint.requests[0][k] for k in ("model", "temperature", "max_tokens")} == {
        "model": "m",
        "temperature": 0.0,
        "max_tokens": 512,
    }
    assert endpoint.keys == [f"Bearer {KEY}"]


def test_a_verdict_is_asked_for_once_on_this_disk() -> None:
    with FakeEndpoint(by_response) as endpoint:
        judge(endpoint).score_all(ANSWERS, examples())
        again = judge(endpoint)  # as in another process
        again.score_all([*ANSWERS, *ANSWERS], examples() + examples())
        assert len(endpoint.requests) == 3
        assert (again.usage.calls, again.cached) == (0, 3)
        judge(endpoint, max_reply=5).score_all(["right"], examples(1))  # another way of asking
        judge(endpoint).score_all(["right"], examples(2)[1:])  # another question
        judge(endpoint, template="{question}{answer}\n{response}").score_all(["right"], examples(1))
        assert len(endpoint.requests) == 6


def test_a_damaged_verdict_is_asked_for_again() -> None:
    with FakeEndpoint(by_response) as endpoint:
        judge(endpoint).score_all(["right"], examples(1))
        (file,) = Path("cache").glob("??/*.json")
        file.write_text('{"verdict": "corr')
        assert judge(endpoint).score_all(["right"], examples(1)) == [1.0]
        assert len(endpoint.requests) == 2


def test_without_a_folder_verdicts_are_kept_in_memory() -> None:
    with FakeEndpoint(by_response) as endpoint:
        own = judge(endpoint, cache=None)
        assert own("half", examples(1)[0]) == own("half", examples(1)[0]) == 0.0
        assert len(endpoint.requests) == 1
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_retried(status: int) -> None:
    with FakeEndpoint(lambda n, b: status if n < 2 else by_response(n, b)) as endpoint:
        found = judge(endpoint)
        assert found("right", examples(1)[0]) == 1.0
    assert (found.usage.calls, found.usage.retries) == (1, 2)


def test_the_server_says_when_to_come_back() -> None:
    wait: Said = (429, {"Retry-After": "0.3"})
    with FakeEndpoint(lambda n, b: wait if n < 1 else by_response(n, b)) as endpoint:
        start = time.monotonic()
        assert judge(endpoint)("right", examples(1)[0]) == 1.0
        assert time.monotonic() - start > 0.3


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"choices": []}', b'{"choices": 3}'])
def test_a_body_that_is_no_reply_is_retried_and_then_told(body: bytes) -> None:
    with FakeEndpoint(lambda n, b: body if n < 1 else by_response(n, b)) as endpoint:
        assert judge(endpoint)("right", examples(1)[0]) == 1.0
    with FakeEndpoint(lambda n, b: body) as endpoint:
        with pytest.raises(JudgeError, match="after 3 requests: its answer is no chat completion"):
            judge(endpoint, retries=2)("half", examples(1)[0])
        assert len(endpoint.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 404])
def test_what_does_not_pass_is_not_retried(status: int) -> None:
    with (
        FakeEndpoint(lambda n, b: status) as endpoint,
        pytest.raises(JudgeError, match=f"does not answer: HTTP {status}") as caught,
    ):
        judge(endpoint)("right", examples(1)[0])
    assert len(endpoint.requests) == 1
    assert KEY not in str(caught.value)
    assert "no: ***" in str(caught.value)
    assert ("OPENAI_API_KEY is set" in str(caught.value)) == (status == 401)


def test_a_redirect_takes_the_key_nowhere() -> None:
    with FakeEndpoint(by_response) as other:
        away: Said = (302, {"Location": f"{other.url}/chat/completions"})
        with (
            FakeEndpoint(lambda n, b: away) as endpoint,
            pytest.raises(JudgeError, match="HTTP 302"),
        ):
            judge(endpoint)("right", examples(1)[0])
    assert other.requests == []


def test_without_a_key_none_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with FakeEndpoint(lambda n, b: 401 if n else by_response(n, b)) as endpoint:
        judge(endpoint)("right", examples(1)[0])
        with pytest.raises(JudgeError, match="variable OPENAI_API_KEY is not set"):
            judge(endpoint)("half", examples(1)[0])
    assert endpoint.keys == [None, None]


def test_an_endpoint_that_is_down_keeps_what_was_judged() -> None:
    many = examples(6)
    texts = [f"right {i}" for i in range(6)]
    with FakeEndpoint(lambda n, b: by_response(n, b) if n < 3 else 500) as endpoint:
        with pytest.raises(JudgeError, match="of 6 verdicts those given so far are kept in cache"):
            judge(endpoint, concurrency=1, retries=1).score_all(texts, many)
        assert len(list(Path("cache").glob("??/*.json"))) == 3
        assert len(endpoint.requests) == 5  # the first failure ends the asking
    with FakeEndpoint(by_response) as endpoint:
        assert judge(endpoint).score_all(texts, many) == [1.0] * 6
        assert len(endpoint.requests) == 3
    start = time.monotonic()
    with pytest.raises(JudgeError, match=r"does not answer after 3 requests: .*refused"):
        judge(endpoint, retries=2).score_all(["half"], many[:1])  # it is closed by now
    assert time.monotonic() - start < 5


def test_a_judge_without_a_grade_is_asked_again_and_never_scores_zero() -> None:
    with FakeEndpoint(lambda n, b: "Hm." if n < 2 else "partial") as endpoint:
        found = judge(endpoint)
        assert found("half", examples(1)[0]) == 0.0
        assert found.details(["half"], examples(1))["lenient"] == [1.0]
        assert [len(body["messages"]) for body in endpoint.requests] == [1, 3, 3]
    with (
        FakeEndpoint(lambda n, b: "Not incorrect, I guess.") as endpoint,
        pytest.raises(JudgeError, match=r"gives no grade in 2 rounds: 'Not incorrect, I guess\.'"),
    ):
        judge(endpoint, rounds=2)("right", examples(1)[0])


def test_a_cell_is_undefined_where_the_judge_is_down(caplog: pytest.LogCaptureFixture) -> None:
    responses = [Response("right", 1, False), Response("half", 1, False)]
    with FakeEndpoint(by_response) as endpoint:
        task = PythonTask("medical", test=examples(2), scorer=judge(endpoint, score="graded"))
        cell = summarise(task, task.examples("test"), responses, Artifacts())
    assert cell.score == 0.75
    assert cell.details is not None
    assert {name: found.score for name, found in cell.details.items()} == {
        "strict": 0.5,
        "lenient": 1.0,
    }
    assert type(cell).from_dict(json.loads(json.dumps(cell.to_dict()))) == cell
    task = PythonTask("medical", test=examples(2), scorer=judge(endpoint, None, retries=0))
    with caplog.at_level(logging.WARNING):
        cell = summarise(task, task.examples("test"), responses, Artifacts())
    assert cell.score is None
    assert cell.details is None
    assert cell.error is not None
    assert "the scorer of task 'medical' raised JudgeError: the judge 'm' at http" in cell.error


def test_costs_are_counted() -> None:
    with FakeEndpoint(lambda n, b: 500 if n == 0 else by_response(n, b)) as endpoint:
        prices = {"prompt_price": 1.0, "completion_price": 10.0, "concurrency": 1}
        found = judge(endpoint, **prices)
        found.score_all(ANSWERS, examples())
        found.score_all(ANSWERS, examples())
        expected = {"calls": 3, "retries": 1, "prompt_tokens": 30, "completion_tokens": 6}
        assert found.costs() == {**expected, "cached": 3, "price": pytest.approx(90e-6)}
        assert judge(endpoint).costs()["price"] is None
    (line,) = Path("cache/costs.jsonl").read_text().splitlines()
    written = json.loads(line)
    assert written["model"].startswith("m ")
    assert {key: written[key] for key in expected} == expected


def test_the_key_is_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), FakeEndpoint(by_response) as endpoint:
        found = judge(endpoint)
        found.score_all(ANSWERS, examples())
    assert KEY not in caplog.text
    assert KEY not in str(vars(found)) + str(vars(found.model)) + describe(found)
    for file in Path().rglob("*.json*"):
        assert KEY not in file.read_text()
    with pytest.raises(ValueError, match="key_variable is the name of") as caught:
        ChatEndpoint("http://x/v1", "m", key_variable=KEY)
    assert KEY not in str(caught.value)


def test_its_description_is_what_verdicts_depend_on() -> None:
    with FakeEndpoint(by_response) as endpoint:
        found, same = judge(endpoint), judge(endpoint, None, retries=9)
        found("right", examples(1)[0])
        assert describe(found) == describe(same) != describe(judge(endpoint, score="lenient"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: Judge(m, score="kind"), "score must be one of"),
        (lambda m: Judge(m, template="{question} {answer}"), "the template has no {response}"),
        (lambda m: Judge(m, rounds=0), "rounds must be at least 1"),
        (lambda m: ChatEndpoint("localhost:1", "m"), "base_url must be http"),
        (lambda m: ChatEndpoint("http://x", "m", concurrency=0), "concurrency must be 1 or more"),
        (lambda m: ChatEndpoint("http://x", "m", timeout_s=float("nan")), "timeout_s must be"),
        (lambda m: LocalJudge("x", max_reply=0), "must be at least 1"),
    ],
)
def test_bad_settings(make: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(ChatEndpoint("http://127.0.0.1:9/v1", "m"))


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Fine.\nGrade: CORRECT", Verdict.CORRECT),
        ("**Grade:** incorrect.", Verdict.INCORRECT),
        ("Grade: PARTIAL\n\nGrade: CORRECT", Verdict.CORRECT),
        ("The grade is partially correct", Verdict.PARTIAL),
        ("Verdict: partially", Verdict.PARTIAL),
        ("correct.", Verdict.CORRECT),
        ("INCORRECT", Verdict.INCORRECT),
        ("It is not correct", None),
        ("Grade: CORRECTLY", None),
        ("upgrade: correct", None),
        ("Grade:", None),
        ("", None),
    ],
)
def test_how_a_reply_is_read(reply: str, verdict: Verdict | None) -> None:
    assert read_verdict(reply) is verdict


# A judge on this machine.


def local(model_dir: Path, **options: Any) -> Judge:
    return Judge(LocalJudge(str(model_dir), max_reply=4, dtype="float32", **options), rounds=2)


def test_a_local_judge(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"right": "Grade: CORRECT", "wrong": "Grade: INCORRECT"}
    found = local(model_dir, batch_size=2)
    assert isinstance(found.model, LocalJudge)
    author = found.model._author
    seen: list[int] = []

    def decode(ids: Any) -> str:
        seen.append(len(ids))
        return said["right" if len(seen) % 2 else "wrong"]

    monkeypatch.setattr(author, "decode", decode)
    monkeypatch.setattr(type(author), "prompt_room", 10_000)
    scores = found.score_all(["a", "b b b b", "c c"], examples(3))
    assert scores == [1.0, 1.0, 0.0]  # asked by length: a, c c, b b b b
    assert found.usage.calls == 3
    assert found.usage.completion_tokens == sum(seen)
    assert found.usage.prompt_tokens > 3 * 50
    assert found.score_all(["c c"], [examples(3)[2]]) == [0.0]
    assert len(seen) == 3


def test_a_local_judge_without_a_grade_or_without_room(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(JudgeError, match="has room for 124 tokens, a prompt to judge has"):
        local(model_dir)("a " * 100, examples(1)[0])
    found = local(model_dir)
    assert isinstance(found.model, LocalJudge)
    monkeypatch.setattr(type(found.model._author), "prompt_room", None)
    with pytest.raises(JudgeError, match="gives no grade in 2 rounds"):
        found("a", examples(1)[0])


def test_other_weights_are_another_judge(tmp_path: Path) -> None:
    (tmp_path / "w").write_text("1")
    before = LocalJudge(str(tmp_path)).identity
    (tmp_path / "w").write_text("12")
    assert LocalJudge(str(tmp_path)).identity != before
    assert LocalJudge("owner/name").identity == LocalJudge("owner/name").identity
