"""A step's time line by line, and the tables of docs/scaling.md."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sdft.budget import Device, Storage, Workload, memory_lines, peak, step_time
from sdft.cli import main
from sdft.communication import Network
from sdft.scaling import figure
from sdft.shapes import SHAPES
from sdft.step_time import bottleneck, passes_of, time_lines, total_time

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
SHAPE = SHAPES["qwen2.5-7b"]
WORK = Workload(batch=256, micro_batch=8)


def test_on_one_gpu_the_lines_are_the_step() -> None:
    lines = time_lines(SHAPE, Workload(), Storage(), Device(), Network())
    alone = step_time(SHAPE, Workload(), Storage(), Device())
    found = total_time(lines)
    assert [line.name for line in lines] == list(alone.parts)
    for name in ("generate", "score", "update", "total", "sft"):
        assert getattr(found, name) == pytest.approx(getattr(alone, name))


def test_the_parts_are_those_of_the_cost_model() -> None:
    # By hand, 32 prompts of 512 + 1024 + 1024 tokens: 7.0706e9 parameters without the embedding;
    # 1024 · (2 · 7.0706e9 + 32 · 1023.5 · 57,344) / 4.3e12 and 2 · 7.0706e9 · 32 · 512 / 790e12.
    device, keep = Device(mbu=1.0, mfu=1.0), Storage(checkpointing=False)
    parts = step_time(SHAPE, Workload(), keep, device).parts
    assert parts["decode"] == pytest.approx(3.815, rel=1e-3)
    assert parts["prefill"] == pytest.approx(0.2933, rel=1e-3)
    assert parts["teacher"] == pytest.approx(5 * parts["prefill"])
    assert parts["student"] == pytest.approx(9 * parts["prefill"])


def test_what_is_hidden_and_what_is_not_is_all_that_is_sent() -> None:
    keep, network = Storage(gpus=8), Network()
    fast = {x.name: x for x in time_lines(SHAPE, WORK, keep, Device(), network)}
    student = fast["communication: student"]
    assert 0 < student.seconds < student.hidden  # two layers' worth is waited for
    slow = replace(network, within=1e9)
    crawling = {x.name: x for x in time_lines(SHAPE, WORK, keep, Device(), slow)}
    late = crawling["communication: student"]
    assert late.hidden == pytest.approx(fast["student"].seconds)
    assert late.seconds > late.hidden
    assert bottleneck(list(crawling.values())) is late


def test_a_rollout_waits_for_its_weights() -> None:
    lines = {x.name: x for x in time_lines(SHAPE, WORK, Storage(gpus=8), Device(), Network())}
    assert lines["communication: rollout"].hidden == 0.0


def test_passes_are_those_of_the_gpu_with_most_rows() -> None:
    assert passes_of(Workload(batch=33, micro_batch=2), Storage(gpus=4)) == 5  # 9 rows
    assert passes_of(Workload(batch=3), Storage(gpus=64)) == 1


def test_more_gpus_do_not_make_less_of_a_rollouts_weights() -> None:
    def held(gpus: int) -> float:
        lines = memory_lines(SHAPE, WORK, Storage(gpus=gpus))
        return sum(x.size for x in lines if x.name == "gathered weights" and x.phase == "rollout")

    assert held(8) == held(64) == 2 * SHAPE.parameters


def test_70b_fits_no_141_gb_gpu_however_many_there_are() -> None:
    shape, work = SHAPES["llama-3.1-70b"], Workload(batch=4096)
    lean = Storage(optimizer="adamw_8bit", teacher="bfloat16", gpus=4096)
    assert peak(memory_lines(shape, work, lean)) > 141e9


def test_decoding_gains_little_from_dividing_a_batch() -> None:
    def decode(gpus: int) -> float:
        lines = time_lines(SHAPE, Workload(batch=64), Storage(gpus=gpus), Device(), Network())
        return next(line.seconds for line in lines if line.name == "decode")

    assert decode(64) > decode(1) / 3


# ---------------------------------------------------------------- the command


def test_the_command_reckons_with_communication(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["budget", "--model", "qwen2.5-7b", "--gpus", "16", "--work.batch", "256", "--json"]
    assert main(command) == 0
    fast = json.loads(capsys.readouterr().out)
    names = [line["name"] for line in fast["time_lines"]]
    assert names[-1] == "communication: clipping"
    assert main([*command, "--network.between", "1e8"]) == 0
    slow = json.loads(capsys.readouterr().out)
    assert slow["seconds"]["total"] > fast["seconds"]["total"]
    assert slow["bottleneck"] == "communication: student"


def test_the_tables_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", "--scaling", "--json", "--model", "qwen2.5-7b"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["qwen2.5-7b"]
    assert list(found["qwen2.5-7b"]) == ["1", "8", "64"]
    assert not found["qwen2.5-7b"]["1"]["fits"]
    assert found["qwen2.5-7b"]["64"]["fits"]


def test_the_command_wants_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget"]) == 2
    assert "--model is missing" in capsys.readouterr().err


def test_the_document_holds_what_its_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = DOCUMENT.read_text()
    commands = [line for line in text.splitlines() if line.startswith("python -m sdft budget")]
    assert any("--scaling" in command for command in commands)
    for command in commands:
        main(command.removeprefix("python -m sdft ").split())
        for block in capsys.readouterr().out.split("\n\n"):
            assert block.strip() in text, f"docs/scaling.md lacks what `{command}` prints:\n{block}"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0"), (0.001, "<.01"), (0.25, ".25"), (3.65, "3.6"), (141.1, "141")],
)
def test_figures(value: float | None, text: str) -> None:
    assert figure(value) == text
