"""From documents to a data set: what is asked, what is left out, what is written."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import save_model, write_jsonl
from fake_endpoint import FakeEndpoint, Said

from sdft import JSONLTask
from sdft.cli import main
from sdft.evaluation import Response
from sdft.knowledge import KnowledgeBuild
from sdft.knowledge.local_model import LocalWriter
from sdft.scorers import AnswerWords, ChatEndpoint
from sdft.self_edits.author import Author

KEY = "sk-0123456789abcdef0123"
RIVERS = ["Rhine", "Elbe", "Oder", "Main"]
FILES = ("train", "validation", "test", "ood", "rejected", "passages")
REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "squad_passages"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    Path("docs").mkdir()
    for place, name in enumerate(RIVERS):
        text = f"The {name} is {place + 1}00 km long.\n\nIt was named {name} in 18{place}0."
        Path("docs", f"{name}.txt").write_text(text)


def river(prompt: str) -> str:
    """The first river that a prompt speaks of."""
    return re.findall("|".join(RIVERS), prompt)[0]


def written(prompt: str) -> str:
    name, place = river(prompt), RIVERS.index(river(prompt))
    return (
        f"Here you are.\nQ: How long is the {name}?\nA: {place + 1}00 km\n"
        f"Q: In which year was the {name} named?\nA: 18{place}0\n"
        f"Q: How many km does the {name} have?\nA: {place + 1}00 km\n"
        f"Q: How long is the {name}?\nA: {place + 1}00 km.\n"
        f"Q: According to the text, what is it?\nA: a river\n"
        f"Q: Which river is the {name}?\nA: {name}\n"
        f"Q: Why?"
    )


def answer(number: int, body: dict[str, Any]) -> Said:
    """Writes, answers from the text, and grades, as a good model would."""
    prompt = body["messages"][0]["content"]
    if "Grade: CORRECT" in prompt:
        reference, _, said = prompt.partition("Reference:\n")[2].partition("\n\nAnswer to be")
        return f"Grade: {'CORRECT' if reference in said else 'INCORRECT'}"
    if "write {count}" in prompt or "different questions about it" in prompt:
        return written(prompt)
    if prompt.startswith("Below are"):
        one, other = dict.fromkeys(re.findall("|".join(RIVERS), prompt))
        return f"Q: Is the {one} longer than the {other}?\nA: longer, {one} or {other}"
    question = prompt.rpartition("Question: ")[2]
    name = river(question)
    if prompt.startswith("Answer the question in as few"):
        return "100 km" if name == "Rhine" else "I do not know."
    if "longer" in question:
        one, other = re.findall("|".join(RIVERS), question)
        text = prompt.rpartition("Question: ")[0]
        known = one in text and other in text
        return f"longer, {one} or {other}" if known else "not in the text"
    place = RIVERS.index(name)
    return f"18{place}0" if "year" in question else f"{place + 1}00 km"


def endpoint(fake: FakeEndpoint, **options: Any) -> ChatEndpoint:
    settings = {"backoff_s": 0.001, "concurrency": 1, **options}
    return ChatEndpoint(fake.url, "m", **settings)


def build(**options: Any) -> KnowledgeBuild:
    settings: dict[str, Any] = {"docs": "docs", "out": "data", "indirect": 3}
    settings |= {"validation": 0.0, "test": 0.25}
    return KnowledgeBuild(**settings | options)


def lines(name: str, folder: str = "data") -> list[dict[str, Any]]:
    path = Path(folder, f"{name}.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def manifest(folder: str = "data") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "manifest.json").read_text())
    return found


def content(folder: str = "data") -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(Path(folder).iterdir())}


# ---------------------------------------------------------------- an endpoint writes


def test_an_endpoint_writes_and_checks(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), FakeEndpoint(answer) as fake:
        assert build(writer=endpoint(fake, temperature=0.7)).write() is not None
        assert fake.keys[0] == f"Bearer {KEY}"
        warm = {("Q: the question" in str(r), r["temperature"]) for r in fake.requests}
        assert warm == {(True, 0.7), (False, 0.0)}, "nobody checks by chance"
    train, test, ood = lines("train"), lines("test"), lines("ood")
    assert (len(train), len(test), len(ood)) == (9, 3, 3)
    assert not {(r["prompt"], r["answer"]) for r in train} & {
        (r["prompt"], r["answer"]) for r in test
    }
    assert {r["documents"][0] for r in train} == {f"{name}.txt" for name in RIVERS}
    (long,) = [r for r in train + test if r["prompt"] == "How long is the Oder?"]
    assert long["answer"] == long["demonstration"] == "300 km"
    assert long["context"] == ("Oder\n\nThe Oder is 300 km long.\n\nIt was named Oder in 1820.")
    assert all(len(set(r["documents"])) == 2 for r in ood)
    reasons = Counter(r["reason"] for r in lines("rejected"))
    assert reasons == {
        "duplicate": 4,
        "refers to the text": 4,
        "gives its answer away": 4,
        "a question without an answer": 4,
    }
    assert manifest()["rejected"] == dict(reasons)
    counts = manifest()["counts"]
    assert (counts["documents"], counts["passages"], counts["train"]) == (4, 4, 9)
    # Of a river's three questions two ask for its length: the same fact, asked otherwise.
    facts = {(r["passages"][0], r["answer"]) for r in train}
    again = sum((r["passages"][0], r["answer"]) in facts for r in test)
    assert counts["test_questions_whose_answer_trains"] == again
    everything = "".join(content().values()) + Path("data.work/replies.jsonl").read_text()
    assert KEY not in everything + caplog.text


def test_a_question_that_its_passage_does_not_answer_is_left_out() -> None:
    def wrong(number: int, body: dict[str, Any]) -> Said:
        prompt = body["messages"][0]["content"]
        asks = prompt.startswith("Answer the question from") and "Question: In which" in prompt
        return "It is not in the text." if asks else answer(number, body)

    with FakeEndpoint(wrong) as fake:
        build(writer=endpoint(fake)).write()
    left = [r for r in lines("rejected") if r["reason"] == "not answered from its passage"]
    assert {r["answer"] for r in left} == {"1800", "1810", "1820", "1830"}
    assert {r["detail"] for r in left} == {"It is not in the text."}
    assert not any("year" in r["prompt"] for r in lines("train") + lines("test"))


def test_what_is_known_without_the_passage_is_left_out() -> None:
    with FakeEndpoint(answer) as fake:
        closed = endpoint(fake, max_reply=9)
        build(writer=endpoint(fake), closed_book=closed, scorer=AnswerWords()).write()
        alone = [r for r in fake.requests if r["max_tokens"] == 9]
    assert alone
    assert all("km long" not in r["messages"][0]["content"] for r in alone)
    left = [r for r in lines("rejected") if r["reason"] == "known without its passage"]
    assert {r["question"] for r in left} == {
        "How long is the Rhine?",
        "How many km does the Rhine have?",
    }


def test_an_indirect_question_needs_all_its_passages() -> None:
    def half(number: int, body: dict[str, Any]) -> Said:
        prompt = body["messages"][0]["content"]
        if prompt.startswith("Answer the question from") and "longer" in prompt:
            one, other = re.findall("|".join(RIVERS), prompt.rpartition("Question: ")[2])
            texts = prompt.rpartition("Question: ")[0]
            if (one in texts and other in texts) or "Oder" in texts:
                return f"longer, {one} or {other}"
            return "not in the text"
        return answer(number, body)

    with FakeEndpoint(half) as fake:
        build(writer=endpoint(fake), indirect=6, scorer=AnswerWords()).write()
    left = {r["question"] for r in lines("rejected") if r["reason"] == "one passage answers it"}
    assert left
    assert all("Oder" in question for question in left)
    assert lines("ood")
    assert not any("Oder" in r["prompt"] for r in lines("ood"))


def test_a_reply_that_was_cut_loses_its_last_question_and_says_so() -> None:
    def cut(number: int, body: dict[str, Any]) -> Said:
        said = answer(number, body)
        if not isinstance(said, str) or not said.startswith("Here you are"):
            return said
        reply = {
            "content": "Q: How long is the X?\nA: 1 km\nQ: Which sea does it reach?\nA: the No"
        }
        return json.dumps({"choices": [{"message": reply, "finish_reason": "length"}]}).encode()

    with FakeEndpoint(cut) as fake:
        build(writer=endpoint(fake), answerable="off", indirect=0, test=0.0).write()
    left = [(r["reason"], r["answer"]) for r in lines("rejected")]
    assert ("truncated", "the No") in left
    assert [r["answer"] for r in lines("train")] == ["1 km"]
    assert {path.name for path in Path("data").iterdir()} == {
        "README.md",
        "manifest.json",
        "passages.jsonl",
        "rejected.jsonl",
        "train.jsonl",
    }


# ---------------------------------------------------------------- failures, kills


def test_a_failing_endpoint_is_one_error_and_the_rest_is_asked_for_later() -> None:
    with FakeEndpoint(lambda n, b: 503 if n == 0 else answer(n, b) if n < 4 else 500) as fake:
        own = build(writer=endpoint(fake, retries=1), scorer=AnswerWords())
        with pytest.raises(
            ValueError, match=r"the model that .* 'm' at .* does not answer after 2"
        ) as e:
            own.write()
        assert "of 4 replies (questions about passages) those that came are kept" in str(e.value)
        assert KEY not in str(e.value)
    assert not Path("data").exists()
    assert len(Path("data.work/replies.jsonl").read_text().splitlines()) == 3
    with FakeEndpoint(answer) as fake:
        build(writer=endpoint(fake), scorer=AnswerWords()).write()
        again = [r for r in fake.requests if "different questions" in str(r)]
        assert len(again) == 1
    first = content()
    with FakeEndpoint(answer) as fake:
        build(writer=endpoint(fake), scorer=AnswerWords(), out="whole").write()
    assert content("whole") == first


def test_a_line_that_a_kill_left_unfinished_is_asked_for_again() -> None:
    with FakeEndpoint(answer) as fake:
        build(writer=endpoint(fake), scorer=AnswerWords()).write()
        asked, first = len(fake.requests), content()
        file = Path("data.work/replies.jsonl")
        file.write_bytes(file.read_bytes()[:-9])
        assert build(writer=endpoint(fake), scorer=AnswerWords()).write() is None
        build(writer=endpoint(fake), scorer=AnswerWords()).write(overwrite=True)
        assert len(fake.requests) == asked + 1
    assert content() == first


def test_a_reply_with_odd_line_ends_is_read_back() -> None:
    def odd(number: int, body: dict[str, Any]) -> Said:
        said = answer(number, body)
        return (
            said.replace("Here you are.", "Here\u2028you\x85are.")
            if isinstance(said, str)
            else said
        )

    with FakeEndpoint(odd) as fake:
        build(writer=endpoint(fake), scorer=AnswerWords()).write()
        asked = len(fake.requests)
        build(writer=endpoint(fake), scorer=AnswerWords()).write(overwrite=True)
        assert len(fake.requests) == asked


def test_nothing_is_half_written(monkeypatch: pytest.MonkeyPatch) -> None:
    given_questions()
    build(questions="q.jsonl").write()
    first = content()

    def killed(*args: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("sdft.knowledge.dataset.readme", killed)
    with pytest.raises(KeyboardInterrupt):
        build(questions="q.jsonl", seed=1).write(overwrite=True)
    assert content() == first
    assert sorted(path.name for path in Path().iterdir()) == [
        "data",
        "data.work",
        "docs",
        "q.jsonl",
    ]


def test_other_settings_do_not_pass_for_the_data_set_that_is_there() -> None:
    given_questions()
    build(questions="q.jsonl").write()
    assert build(questions="q.jsonl").write() is None
    for changed in ({"seed": 1}, {"test": 0.3}, {"prompt_template": "{title}: {question}"}):
        with pytest.raises(ValueError, match="holds a data set of other documents or settings"):
            build(questions="q.jsonl", **changed).write()
    Path("docs/Rhine.txt").write_text("The Rhine is 100 km long, and 1800.")
    with pytest.raises(ValueError, match="other documents or settings"):
        build(questions="q.jsonl").write()
    assert build(questions="q.jsonl").write(overwrite=True) is not None
    Path("mine").mkdir()
    Path("mine/thesis.txt").touch()
    with pytest.raises(ValueError, match="holds something that is no data set of ours"):
        build(out="mine").write(overwrite=True)


# ---------------------------------------------------------------- given questions alone


def given_questions() -> None:
    rows = [
        {
            "question": f"How long is the {name}?",
            "answer": f"{i + 1}00 km",
            "document": f"{name}.txt",
        }
        for i, name in enumerate(RIVERS)
    ]
    rows += [
        {"question": f"When was the {name} named?", "answer": f"18{i}0", "document": name}
        for i, name in enumerate(RIVERS)
    ]
    rows += [{"question": "Who is it?", "answer": "Ann", "document": "Oder"}]
    write_jsonl(Path("q.jsonl"), rows)


def test_given_questions_need_no_model() -> None:
    given_questions()
    data = build(questions="q.jsonl", prompt_template="{title}: {question}").write()
    assert data is not None
    assert not Path("data.work").exists()
    train, test, ood = lines("train"), lines("test"), lines("ood")
    assert (len(train), len(test), len(ood)) == (6, 2, 3)
    assert {r["documents"][0] for r in train} == {f"{name}.txt" for name in RIVERS}
    assert train[0]["prompt"].startswith("Elbe: ")
    ids = {r["id"]: r for r in train}
    for record in ood:  # what is composed has been trained on, part by part
        parts = [ids[key] for key in record["parts"]]
        assert record["answer"] == "; ".join(part["answer"] for part in parts)
        assert all(part["context"] in record["context"] for part in parts)
        assert len(set(record["documents"])) == 2
    (left,) = lines("rejected")
    assert left["reason"] == "the answer's words do not stand in the passage"
    assert left["place"] == "q.jsonl, line 9"
    assert "words do not stand in the passage | 1 |" in Path("data/README.md").read_text()


def test_the_same_question_with_another_answer_is_left_out() -> None:
    Path("docs").joinpath("more.jsonl").write_text(
        json.dumps(
            {"text": "Ann won in 1900.", "questions": [{"question": "Who won?", "answer": "Ann"}]}
        )
        + "\n"
        + json.dumps(
            {"text": "Bo won in 1904.", "questions": [{"question": "who won", "answer": "Bo"}]}
        )
    )
    build(test=0.0, indirect=0).write()
    assert [r["answer"] for r in lines("train")] == ["Ann"]
    assert [r["reason"] for r in lines("rejected")] == ["the same question has another answer"]


def test_the_seed_decides_the_splits_and_nothing_else_does() -> None:
    given_questions()
    for folder, seed in (("one", 0), ("two", 0)):
        build(questions="q.jsonl", out=folder, seed=seed).write()
    assert content("one") == content("two")
    tests = set()
    for seed in range(6):
        build(questions="q.jsonl", out=f"s{seed}", seed=seed).write()
        tests.add(tuple(r["id"] for r in lines("test", f"s{seed}")))
    assert len(tests) > 1


def test_tasks_read_the_files_as_they_are() -> None:
    given_questions()
    build(questions="q.jsonl", validation=0.1).write()
    files = {name: f"data/{name}.jsonl" for name in ("train", "validation", "test")}
    task = JSONLTask("knowledge", **files, scorer=AnswerWords())
    for split in ("train", "validation", "test"):
        found = task.examples(split)
        assert found
        assert all(e.context and e.answer == e.demonstration for e in found)
    ood = JSONLTask("ood", test="data/ood.jsonl").examples("test")
    assert all(AnswerWords()(example.answer, example) == 1 for example in ood)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    given_questions()
    settings = {"docs": "docs", "out": "data", "questions": "q.jsonl", "indirect": 2}
    Path("build.yaml").write_text(yaml.safe_dump(settings))
    assert main(["knowledge", "build", "--config", "build.yaml", "--validation", "0"]) == 0
    out = capsys.readouterr().out
    assert "4 documents, 4 passages: 6 train, 0 validation, 2 test, 2 ood" in out
    assert "left out: 1 (1 the answer's words do not stand in the passage)" in out
    assert main(["knowledge", "build", "--config", "build.yaml", "--validation", "0"]) == 0
    assert "is there already" in capsys.readouterr().out
    assert main(["knowledge", "train"]) == 2
    assert "say build or table, found 'train'" in capsys.readouterr().err
    with FakeEndpoint(answer) as fake:
        model = ["--writer", "ChatEndpoint", "--writer.base_url", fake.url, "--writer.model", "m"]
        assert main(["knowledge", "build", "--docs", "docs", "--out", "e", *model]) == 0
    assert lines("train", "e")


@pytest.mark.skipif(not REAL.is_dir(), reason="the passages are not here")
def test_real_passages_with_their_questions() -> None:
    build(docs=str(REAL), limit=60, validation=0.1, test=0.2, indirect=20, chunk_size=120).write()
    counts = manifest()["counts"]
    assert counts["documents"] == 60
    assert counts["passages"] > 60
    assert counts["train"] > 300
    assert counts["ood"] == 20
    assert counts["test"] > 60
    assert max(len(r["text"].split()) for r in lines("passages")) <= 120
    assert str(REAL.parent) not in "".join(content().values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"test": 1.0}, "must be shares that leave some to train on"),
        ({"validation": -0.1}, "must be shares that leave some to train on"),
        ({"indirect_documents": 1}, "indirect_documents must be at least 2"),
        ({"prompt_template": "x"}, "prompt_template lacks {question}"),
        ({"prompt_template": "{question} {name}"}, "only {question} and {title} may stand in it"),
        ({"templates": {"ask": "x"}}, "templates: found 'ask', allowed are"),
        ({"templates": {"write": "{passage}"}}, "templates.write lacks {count}"),
        ({"answerable": "model"}, "neither a checker nor a writer"),
        ({"indirect_by": "writer"}, "indirect_by is writer, but there is none"),
        ({"reject_patterns": ["("]}, "is no regular expression"),
        ({"duplicate_threshold": 2.0}, r"duplicate_threshold must lie in \(0, 1\]"),
        ({"docs": "nowhere"}, "nowhere does not exist"),
        ({"questions": "nowhere.jsonl"}, "questions: .*nowhere.jsonl does not exist"),
        ({"chunk_unit": "tokens"}, "name a model as tokenizer"),
        ({}, "not one question about a passage is left"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options).write()
    assert not Path("data").exists()


# ---------------------------------------------------------------- a model on this machine


class Pen:
    """Stands in for what a local model draws; fails at one of its batches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> None:
        self.seeds: list[int] = []
        self.fail_at = fail_at
        monkeypatch.setattr(Author, "prompt_room", None)
        monkeypatch.setattr(Author, "respond", self.respond)

    def respond(self, prompts: Sequence[Sequence[int]], sampling: Any) -> list[Response]:
        if self.fail_at is not None and len(self.seeds) == self.fail_at:
            raise KeyboardInterrupt
        assert sampling.temperature == 0.7
        self.seeds.append(torch.initial_seed())
        number = int(torch.randint(100, (1,)))
        texts = [f"Q: What is {number}{i}{len(p)}?\nA: {number}{i}" for i, p in enumerate(prompts)]
        return [Response(text, 3, False) for text in texts]


def local(model_dir: Path, **options: Any) -> KnowledgeBuild:
    writer = LocalWriter(str(model_dir), batch_size=2, dtype="float32", device="cpu")
    settings = {"answerable": "off", "indirect": 0, "test": 0.0}
    return build(writer=writer, **settings | options)


def test_a_local_model_draws_by_the_seed_wherever_it_was_killed(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Pen(monkeypatch)
    local(model_dir, out="whole").write()
    local(model_dir, out="again").write()
    assert content("again") == content("whole")
    local(model_dir, out="other", seed=1).write()
    assert content("other")["train.jsonl"] != content("whole")["train.jsonl"]
    Pen(monkeypatch, fail_at=1)
    with pytest.raises(KeyboardInterrupt):
        local(model_dir, out="killed").write()
    file = Path("killed.work/replies.jsonl")
    (first, _) = file.read_text().splitlines(keepends=True)
    file.write_text(first)  # killed between two lines of a batch
    Pen(monkeypatch)
    local(model_dir, out="killed").write()
    assert content("killed") == content("whole")
    local(model_dir, out="grown", limit=3).write()
    local(model_dir, out="grown").write(overwrite=True)
    assert content("grown") == content("whole"), "replies of other batches are others"


def test_a_real_local_model_writes_something(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m", max_position_embeddings=512)
    given_questions()
    writer = LocalWriter(str(folder), max_reply=8, dtype="float32", device="cpu")
    build(writer=writer, questions="q.jsonl", answerable="text").write()
    assert lines("train")
    reasons = Counter(r["reason"] for r in lines("rejected"))
    assert reasons["truncated"] + reasons["no question could be read"] >= 4
    assert manifest()["tokens"]["written"] > 0


def test_writer_and_checker_are_one_loaded_model(model_dir: Path) -> None:
    writer = LocalWriter(str(model_dir), dtype="float32")
    own = build(writer=writer)
    assert isinstance(own.checker, LocalWriter)
    assert own.checker._author is writer._author
    assert (own.checker.sampling.temperature, writer.sampling.temperature) == (0.0, 0.7)
    assert own.checker.identity != writer.identity


def test_a_prompt_without_room_is_told(model_dir: Path) -> None:
    Path("docs/long.txt").write_text("a " * 200)
    with pytest.raises(ValueError, match=r"the model that .* has room for .* a prompt has"):
        build(writer=LocalWriter(str(model_dir), max_reply=8, dtype="float32")).write()


def tokens_of(model_dir: Path) -> Callable[[str], int]:
    return build(chunk_unit="tokens", tokenizer=str(model_dir))._measure()


def test_tokens_measure_passages(model_dir: Path) -> None:
    assert tokens_of(model_dir)("a b c d") == 4
