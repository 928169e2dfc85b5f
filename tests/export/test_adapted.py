"""Adapters in a checkpoint become an ordinary model, or a folder that peft loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_export_command import error, export, fit, logits
from transformers import AutoModelForCausalLM

from sdft.adapters import MARK, own_parameters, twin, widen
from sdft.lora import LoRA

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def adapted_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(tmp_path_factory.mktemp("adapted"), "llama", lora={"rank": 2, "alpha": 6.0})


@pytest.fixture
def expected(adapted_run: Path) -> Callable[[str], torch.Tensor]:
    """Logits of student or teacher, from the base and the checkpoint's tensors by hand."""

    def of(part: str) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(adapted_run.parent.parent / "base")
        LoRA(2, 6.0).inject(model)
        if part == "teacher":
            model = twin(model)
            widen(model, 8)
        path = adapted_run / "checkpoints" / "last.ckpt"
        state = torch.load(path, weights_only=True)["state_dict"]
        own = {k.removeprefix(f"{part}."): v for k, v in state.items() if k.startswith(part)}
        assert len(own) == len(own_parameters(model))
        assert all(MARK in name for name in own)
        model.load_state_dict(own, strict=False)
        return logits(model)

    return of


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_merged_it_is_an_ordinary_model(
    which: str, adapted_run: Path, expected: Callable[[str], torch.Tensor], tmp_path: Path
) -> None:
    assert export(adapted_run, tmp_path / "out", "--which", which) == 0
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    base = logits(AutoModelForCausalLM.from_pretrained(adapted_run.parent.parent / "base"))
    torch.testing.assert_close(found, expected(which), atol=1e-5, rtol=1e-5)
    assert (found - base).abs().max() > 1e-4


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_unmerged_peft_loads_it_onto_the_base(
    which: str, adapted_run: Path, expected: Callable[[str], torch.Tensor], tmp_path: Path
) -> None:
    flags = ("--which", which, "--no-merge")
    assert export(adapted_run, tmp_path / "out", *flags) == 0
    assert not (tmp_path / "out" / "config.json").exists()
    assert "base" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    base = AutoModelForCausalLM.from_pretrained(adapted_run.parent.parent / "base")
    found = logits(peft.PeftModel.from_pretrained(base, tmp_path / "out"))
    torch.testing.assert_close(found, expected(which), atol=1e-5, rtol=1e-5)
    assert export(adapted_run, tmp_path / "out", *flags, "--overwrite") == 0


def test_another_base_is_refused(
    adapted_run: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = AutoModelForCausalLM.from_pretrained(model_dir)
    other.lm_head.weight.data += 1.0
    other.save_pretrained(tmp_path / "other")
    assert export(adapted_run, tmp_path / "out", "--model", str(tmp_path / "other")) == 2
    assert "belong to another base" in error(capsys)
    assert not (tmp_path / "out").exists()
