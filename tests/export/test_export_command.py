"""`python -m sdft export`: the folder holds the very model, says where it comes from, is whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import FAMILIES, TEMPLATE, echo_examples, make_tokenizer, save_model, write_jsonl
from safetensors.torch import load_file
from shards import Bomb, as_shards
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import sdft.export.model_folder
import sdft.report
from sdft.cli import main
from sdft.report import RetentionReport

PROMPT = torch.tensor([[3, 6, 9, 10, 11, 4, 6]])


def fit(folder: Path, family: str, **model: Any) -> Path:
    """A run of two tasks through the command line; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    base = save_model(folder / "base", family=family)
    rows = [{"prompt": e.prompt, "answer": e.answer} for e in echo_examples(5)]
    file = str(write_jsonl(folder / "rows.jsonl", rows))

    def task(name: str, **files: str) -> dict[str, Any]:
        return {"class_path": "JSONLTask", "init_args": {"name": name, **files}}

    config = {
        "seed_everything": 3,
        "trainer": {
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "log_every_n_steps": 1,
            "default_root_dir": str(folder),
        },
        "model": {
            "model_name": str(base),
            "max_new_tokens": 5,
            "teacher_template": TEMPLATE,
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            **model,
        },
        "teacher": {"rate": 0.2},
        "data": {
            "batch_size": 4,
            "steps": 2,
            "tasks": [task("one", train=file, test=file), task("two", train=file, test=file)],
            "suites": [task("prior", test=file)],
        },
        "checkpoint": {"every_n_steps": 1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdft.report, "save_figure", lambda figure, path: Path(path).touch())
        for name in ("plot_matrix", "plot_curves"):
            patch.setattr(sdft.report, name, lambda *args: None)
        assert main(["fit", "--config", str(folder / "run.yaml")]) == 0
    return folder / "lightning_logs" / "version_0"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def run(family: str) -> Path:
        if family not in made:
            made[family] = fit(tmp_path_factory.mktemp(family), family)
        return made[family]

    return run


@pytest.fixture
def run(runs: Callable[[str], Path]) -> Path:
    return runs("llama")


def last(run: Path) -> Path:
    return run / "checkpoints" / "last.ckpt"


def export(run_or_ckpt: Path, out: Path, *flags: str) -> int | str | None:
    try:
        return main(["export", "--ckpt", str(run_or_ckpt), "--out", str(out), *flags])
    except SystemExit as stop:
        return stop.code


def error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    (told,) = [line for line in lines if line.startswith("sdft: error: ")]
    assert not any(line.startswith("Traceback") for line in lines)
    return told.removeprefix("sdft: error: ")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(PROMPT, attention_mask=torch.ones_like(PROMPT)).logits
    return found


def in_checkpoint(run: Path, family: str, part: str) -> Any:
    """The model of a checkpoint, put together by hand."""
    state = torch.load(last(run), weights_only=True)["state_dict"]
    model = FAMILIES[family](seed=99)
    own = {k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(f"{part}.")}
    model.load_state_dict(own)
    return model


# ---------------------------------------------------------------- the same model


@pytest.mark.parametrize("form", ["whole", "sharded"])
@pytest.mark.parametrize("part", ["student", "teacher"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_loading_it_back_gives_the_same_logits(
    runs: Callable[[str], Path], tmp_path: Path, family: str, part: str, form: str
) -> None:
    """Bit for bit in fp32; heads that are tied stay tied (Qwen2, GPT-2)."""
    folder = runs(family)
    path = as_shards(last(folder), tmp_path / "s.ckpt") if form == "sharded" else last(folder)
    assert export(path, tmp_path / "out", "--which", part) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32
    assert torch.equal(logits(model), logits(in_checkpoint(folder, family, part)))
    other = "teacher" if part == "student" else "student"
    assert not torch.equal(logits(model), logits(in_checkpoint(folder, family, other)))
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (family != "llama")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_precision(run: Path, tmp_path: Path, dtype: str) -> None:
    assert export(run, tmp_path / "out", "--dtype", dtype) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    wanted = getattr(torch, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    reference = in_checkpoint(run, "llama", "student")
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    assert all(torch.equal(own, other.to(wanted)) for own, other in pairs)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"The weights were converted to {dtype}" in card


def test_the_precision_of_the_checkpoint_by_default(tmp_path: Path) -> None:
    """A bf16 student has an fp32 teacher."""
    run = fit(tmp_path / "half", "llama", dtype="bfloat16")
    for part, dtype in (("student", torch.bfloat16), ("teacher", torch.float32)):
        assert export(run, tmp_path / part, "--which", part) == 0
        weights = load_file(tmp_path / part / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {dtype}
        assert "converted" not in (tmp_path / part / "README.md").read_text()


def test_everything_that_belongs_to_a_model(run: Path, tmp_path: Path) -> None:
    base = run.parent.parent / "base"
    GenerationConfig(eos_token_id=[1, 7], top_k=5, do_sample=True).save_pretrained(base)
    try:
        assert export(run, tmp_path / "out") == 0
    finally:
        (base / "generation_config.json").unlink()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "a b"}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    own = make_tokenizer()
    assert tokenizer.apply_chat_template(chat, **options) == own.apply_chat_template(
        chat, **options
    )
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [1, 7]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"} <= names
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_it_can_be_trained_on(run: Path, tmp_path: Path) -> None:
    assert export(run, tmp_path / "out") == 0
    config = yaml.safe_load((run.parent.parent / "run.yaml").read_text())
    config["model"]["model_name"] = str(tmp_path / "out")
    config["trainer"]["default_root_dir"] = str(tmp_path / "on")
    config["retention"] = {"enabled": False}
    (tmp_path / "on.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "on.yaml")]) == 0


# ---------------------------------------------------------------- which checkpoint


def test_last_and_a_folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(run.parent.parent)
    assert main(["export", "--ckpt", "last", "--root", root, "--out", str(tmp_path / "a")]) == 0
    monkeypatch.chdir(root)
    assert main(["export", "--ckpt", "last", "--out", str(tmp_path / "b")]) == 0
    assert export(run, tmp_path / "c") == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] == weights[2]


def test_the_base_may_have_moved(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "lightning_logs" / "version_0"
    shutil.copytree(run, folder)
    content = torch.load(last(folder), weights_only=True)
    content["sdft"]["model"] = str(tmp_path / "gone")
    torch.save(content, last(folder))
    assert export(folder, tmp_path / "out") == 2
    told = error(capsys)
    assert f"{str(tmp_path / 'gone')!r} does not exist" in told
    assert "--model says where" in told
    base = str(run.parent.parent / "base")
    assert export(folder, tmp_path / "out", "--model", base) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(model), logits(in_checkpoint(run, "llama", "student")))
    assert "Not found beside the checkpoint" in (tmp_path / "out" / "README.md").read_text()


def test_another_base(
    run: Path, runs: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of another architecture, or with other sizes."""
    for base in (runs("qwen2").parent.parent / "base", save_model(tmp_path / "b", hidden_size=48)):
        assert export(run, tmp_path / "out", "--model", str(base)) == 2
        assert "belongs to another model" in error(capsys)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the card


def test_the_card_and_the_facts(run: Path, tmp_path: Path) -> None:
    assert export(run, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    facts = json.loads((tmp_path / "out" / "sdft.json").read_text())
    digest = hashlib.sha256(last(run).read_bytes()).hexdigest()
    report = json.loads((run / "retention.json").read_text())
    assert facts["checkpoint"] == {
        "path": "version_0/checkpoints/stage-2-two.ckpt",
        "sha256": digest,
        "step": 4,
        "steps_since_measured": 0,
    }
    for key in ("tasks", "suites", "matrix", "metrics", "seed", "method"):
        assert facts["retention"][key] == report[key], key
    assert (facts["method"], facts["seed"], facts["which"]) == ("sdft", 3, "student")
    assert facts["config"] == yaml.safe_load((run / "config.yaml").read_text())
    assert set(facts["exported_with"]) >= {"sdft", "torch", "transformers", "lightning"}
    _, front, _ = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert "base_model" not in yaml.safe_load(front), "a path is no name of the hub's"
    for words in (digest, "| seed | 3 |", "after 2. two", "(prior suite)", "lr: 0.01", "`sdft`"):
        assert words in card, words
    for cells in zip(*report["matrix"], strict=True):
        scores = [f"{cell['score']:.2f}" for cell in cells]
        assert f"| {' | '.join(scores)} |" in card
    assert "were not measured" not in card


def test_the_card_of_a_teacher_says_that_it_was_not_measured(run: Path, tmp_path: Path) -> None:
    assert export(run, tmp_path / "out", "--which", "teacher") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "measured on the student, not on the teacher" in card
    assert "The teacher (moving average)" in card


def test_the_table_is_that_of_the_checkpoint_not_of_the_whole_run(
    run: Path, tmp_path: Path
) -> None:
    stage = run / "checkpoints" / "stage-1-one.ckpt"
    assert export(stage, tmp_path / "out") == 0
    facts = json.loads((tmp_path / "out" / "sdft.json").read_text())
    assert len(facts["retention"]["matrix"]) == 2
    assert facts["checkpoint"]["step"] == 2
    assert "after 2. two" not in (tmp_path / "out" / "README.md").read_text()


def test_a_checkpoint_in_the_middle_of_a_stage(run: Path, tmp_path: Path) -> None:
    content = torch.load(run / "checkpoints" / "stage-1-one.ckpt", weights_only=True)
    content["global_step"] = 3
    (tmp_path / "checkpoints").mkdir()
    torch.save(content, tmp_path / "checkpoints" / "last.ckpt")
    assert export(tmp_path, tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "1 optimizer steps since the table's last row" in card
    # Nothing lies beside this one: the suite's name comes from the checkpoint.
    assert "prior (prior suite)" in card
    assert "| seed | unknown |" in card


def test_without_retention(run: Path, tmp_path: Path) -> None:
    content = torch.load(last(run), weights_only=True)
    content["callbacks"] = {}
    torch.save(content, tmp_path / "bare.ckpt")
    assert export(tmp_path / "bare.ckpt", tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Nothing was measured in this run." in card
    assert "No score is known" in card
    assert json.loads((tmp_path / "out" / "sdft.json").read_text())["retention"] is None


def test_files_of_another_run_are_left_out(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["init_args"]["model_name"] = "another"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    report = RetentionReport.load(folder)
    report.tasks = ["three", "four"]
    (folder / "retention.json").write_text(json.dumps(report.to_dict()))
    assert export(folder, tmp_path / "out") == 0
    facts = json.loads((tmp_path / "out" / "sdft.json").read_text())
    assert facts["config"] is None
    assert facts["retention"]["tasks"] == ["one", "two"]
    assert facts["retention"]["suites"] == ["prior"]


# ---------------------------------------------------------------- where it goes


def test_a_folder_that_is_there(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert export(run, out) == 0, "an empty folder is free"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert export(run, out, "--which", "teacher") == 2
    assert "is not empty: name another folder, or --overwrite" in error(capsys)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "stale.txt").touch()
    assert export(run, out, "--which", "teacher", "--overwrite") == 0
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert after.keys() == before.keys()
    assert after["model.safetensors"] != before["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_no_model_is_never_overwritten(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert export(run, tmp_path, "--overwrite") == 2
    assert "holds something else than a model" in error(capsys)
    assert export(run, tmp_path / "thesis.txt", "--overwrite") == 2
    assert "is a file: name a folder" in error(capsys)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("there", [False, True])
def test_an_export_that_fails_leaves_what_was_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    out = tmp_path / "deep" / "out"
    if there:
        assert export(run, out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()} if there else {}

    class Full:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

        def text(self) -> str:
            raise OSError(28, "No space left on device", "README.md")

    monkeypatch.setattr("sdft.export.command.ModelCard", lambda *a, **k: _full(Full(), k))
    assert export(run, out, "--overwrite", "--which", "teacher") == 2
    assert out.exists() == there
    assert {path.name: path.read_bytes() for path in out.glob("*")} == before
    assert [path.name for path in out.parent.iterdir()] == (["out"] if there else [])


def _full(card: Any, values: dict[str, Any]) -> Any:
    card.dtype = "float32"
    return card


# ---------------------------------------------------------------- bad input


def test_nothing_of_a_malicious_checkpoint_runs(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(last(run), weights_only=True)
    torch.save({**content, "extra": Bomb(tmp_path / "exploded")}, tmp_path / "bad.ckpt")
    assert export(tmp_path / "bad.ckpt", tmp_path / "out") == 2
    told = error(capsys)
    assert "bad.ckpt is no checkpoint of plain values: it names posix.system" in told
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = last(run).read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[: len(content) // 2])
    assert export(tmp_path / "cut.ckpt", tmp_path / "out") == 2
    assert "cut.ckpt is damaged: its archive has no end" in error(capsys)
    shards = as_shards(last(run), tmp_path / "s.ckpt")
    os.truncate(next(shards.glob("*.distcp")), 1000)
    assert export(shards, tmp_path / "out") == 2
    assert "s.ckpt is damaged or no checkpoint" in error(capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ckpt", "nowhere.ckpt"], "--ckpt nowhere.ckpt: there is no checkpoint"),
        (["--ckpt", "last", "--root", "nowhere"], "--ckpt last: no checkpoints/*.ckpt below"),
        (["--which", "anchor"], "which"),
        (["--dtype", "int8"], "dtype"),
        (["--no-merge"], "--no-merge: the checkpoint holds no adapters"),
        (["--model", "/nowhere/at/all"], "'/nowhere/at/all' does not exist"),
    ],
)
def test_bad_flags(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    assert export(run, tmp_path / "out", *flags) == 2
    assert message in error(capsys)
    assert not (tmp_path / "out").exists()


def test_a_method_without_a_teacher(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(last(run), weights_only=True)
    state = content["state_dict"]
    content["state_dict"] = {k: v for k, v in state.items() if k.startswith("student.")}
    content["sdft"]["method"] = "sft"
    torch.save(content, tmp_path / "sft.ckpt")
    assert export(tmp_path / "sft.ckpt", tmp_path / "out", "--which", "teacher") == 2
    assert "holds no teacher, only: student (method 'sft')" in error(capsys)
