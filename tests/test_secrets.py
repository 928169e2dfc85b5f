"""Secrets through the command line: the run uses them, and no file that it leaves holds them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TEMPLATE, echo_examples, write_jsonl
from shards import Bomb, as_shards

from sdft.cli import main
from sdft.self_edits.outputs import OutputFile
from sdft.stores import MANIFEST, describe, open_store

pytestmark = pytest.mark.usefixtures("no_plots")

KEY = "swordfish-0123456789"
HUB = "hf_" + "aBcDeF0123" * 3
LOGIN = "me:trustno1"
SECRETS = (KEY, HUB, "trustno1")

ENGINE = f"""
from collections.abc import Sequence

from transformers import PreTrainedModel

from sdft.decode import DecodeEngine
from sdft.rollout import Rollout, Sampling


class Keyed(DecodeEngine):
    def __init__(self, api_key: str, url: str = "", note: str = "") -> None:
        super().__init__()
        self.given = (api_key, url, note)

    def generate(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        eos_ids: Sequence[int],
        pad_id: int,
    ) -> Rollout:
        assert self.given == ({KEY!r}, "https://{LOGIN}@host/v1", "uses {HUB} now"), "not the real"
        return super().generate(model, prompts, sampling, eos_ids, pad_id)
"""


@pytest.fixture
def config(tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    module = f"own_engine_{tmp_path.name}"  # imported once per process and name
    Path(f"{module}.py").write_text(ENGINE)
    rows = [{"prompt": e.prompt, "answer": e.answer} for e in echo_examples(4)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    engine = {"api_key": KEY, "url": f"https://{LOGIN}@host/v1", "note": f"uses {HUB} now"}
    files = {"name": "one", "train": "rows.jsonl", "test": "rows.jsonl"}
    return {
        "seed_everything": 1,
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1},
        "model": {
            "class_path": "sdft.SDFTModule",
            "init_args": {
                "model_name": str(model_dir),
                "max_new_tokens": 4,
                "teacher_template": TEMPLATE,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
                "engine": {"class_path": f"{module}.Keyed", "init_args": engine},
            },
        },
        "data": {
            "steps": 1,
            "batch_size": 2,
            "tasks": [{"class_path": "JSONLTask", "init_args": files}],
        },
    }


def run(config: dict[str, Any], *flags: str) -> int | str | None:
    Path("run.yaml").write_text(yaml.safe_dump(config))
    try:
        return main(["fit", "--config", "run.yaml", "--trainer.default_root_dir", "out", *flags])
    except SystemExit as stop:
        return stop.code


def error(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    (told,) = [line for line in lines if line.startswith("sdft: error: ")]
    return told


def test_no_file_of_a_run_holds_a_secret(config: dict[str, Any]) -> None:
    assert run(config) == 0
    assert main(["export", "--ckpt", "last", "--root", "out", "--out", "model"]) == 0
    files = [path for root in ("out", "model") for path in Path(root).rglob("*") if path.is_file()]
    assert len(files) > 15
    for path in files:
        content = path.read_bytes()
        assert not any(secret.encode() in content for secret in SECRETS), path
    (written,) = Path("out").rglob("config.yaml")
    engine = yaml.safe_load(written.read_text())["model"]["init_args"]["engine"]["init_args"]
    assert engine == {"api_key": "***", "url": "https://***@host/v1", "note": "uses *** now"}
    assert "api_key: '***'" in Path("model/README.md").read_text()


def test_the_rest_of_the_configuration_is_whole(config: dict[str, Any]) -> None:
    assert run(config) == 0
    (written,) = Path("out").rglob("config.yaml")
    found = yaml.safe_load(written.read_text())
    assert found["data"]["init_args"]["tasks"][0]["init_args"]["train"] == "rows.jsonl"
    assert found["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.01
    assert found["trainer"]["default_root_dir"] == "out"
    assert [path.name for path in written.parent.glob(".*")] == []


def test_a_configuration_without_its_secrets_says_so(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config) == 0
    (written,) = Path("out").rglob("config.yaml")
    capsys.readouterr()
    assert main(["fit", "--config", str(written)]) == 2
    told = error(capsys)
    assert "model.init_args.engine.init_args.api_key is '***'" in told
    assert "give this value anew" in told


def test_an_error_does_not_show_a_secret(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config, "--data.batch_size", HUB) == 2
    told = error(capsys)
    assert "batch_size" in told
    assert HUB not in told


def test_a_comparison_refuses_a_secret(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("base.yaml").write_text(yaml.safe_dump(config))
    Path("methods").mkdir()
    Path("methods/sft.yaml").write_text("model: {class_path: SFTModule}\n")
    Path("compare.yaml").write_text("base: base.yaml\nmethods: {sft: }\nout: compared\n")
    assert main(["compare", "--config", "compare.yaml"]) == 2
    told = error(capsys)
    assert "model.init_args.engine.init_args.api_key holds a secret" in told
    assert not any(secret in told for secret in SECRETS)
    assert not list(Path("compared").rglob("run.yaml"))


def test_stores_and_self_edits_hold_none(tmp_path: Path) -> None:
    class Asks:
        def __init__(self) -> None:
            self.api_key = KEY

    made_from = {"checks": describe([Asks()]), "hf_token": HUB, "length": 3}
    store = open_store([tmp_path], "answers", made_from, lambda folder: {})
    text = (store.folder / MANIFEST).read_text()
    assert json.loads(text)["made_from"]["length"] == 3
    assert not any(secret in text for secret in SECRETS)
    assert open_store([tmp_path], "answers", made_from, lambda folder: {}).reused
    other = {**made_from, "hf_token": HUB + "x"}
    assert not open_store([tmp_path], "answers", other, lambda folder: {}).reused
    file = OutputFile(tmp_path / "outputs.jsonl", made_from)
    file.begin(0, 1, overwrite=False)
    assert not any(secret in file.path.read_text() for secret in SECRETS)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("form", ["whole", "index", "facts"])
def test_resuming_runs_nothing_of_a_checkpoint(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path, form: str
) -> None:
    assert run(config) == 0
    (last,) = Path("out").rglob("last.ckpt")
    content = {**torch.load(last, weights_only=True), "more": Bomb(tmp_path / "exploded")}
    path = Path("bad.ckpt")
    if form == "whole":
        torch.save(content, path)
    else:
        as_shards(last, path)
    if form == "facts":
        del content["state_dict"], content["optimizer_states"]
        torch.save(content, path / "meta.pt")
    elif form == "index":
        (path / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    capsys.readouterr()
    assert run(config, "--ckpt_path", str(path)) == 2
    assert "bad.ckpt is no checkpoint of plain values: it names posix.system" in error(capsys)
    assert not (tmp_path / "exploded").exists()


def test_turning_the_care_off_is_told(
    config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert run(config) == 0
    assert "weights_only is off" not in caplog.text
    assert run(config, "--ckpt_path", "last", "--weights_only", "false") == 0
    assert "weights_only is off: a checkpoint may run code of its own" in caplog.text


@pytest.mark.parametrize("name", ["../../up", "/tmp/anywhere", "a/b", "..", "x" * 300])
def test_a_task_name_that_leads_elsewhere(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str], name: str, tmp_path: Path
) -> None:
    before = set(tmp_path.parent.rglob("*.ckpt"))
    config["data"]["tasks"][0]["init_args"]["name"] = name
    assert run(config) == 2
    assert "task name" in error(capsys)
    assert set(tmp_path.parent.rglob("*.ckpt")) == before
