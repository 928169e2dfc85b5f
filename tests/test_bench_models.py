"""Which model a benchmark runs on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from test_prepare import load

from sdft.optim import AdamWBF16
from sdft.shapes import SHAPES, ModelShape

models = load("bench_models")
contenders = load("bench_contenders")
material = load("bench_material")
TINY = material.Setting(
    layers=1, hidden=16, heads=2, intermediate=16, vocab=64, batch=2, prompt=4, completion=3
)


def given(*args: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    models.add_arguments(parser)
    return parser.parse_args(args)


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b"])
def test_random_weights_have_the_shape_that_was_asked_for(name: str) -> None:
    setting = models.read_setting(given("--shape", name))
    assert (setting.batch, setting.completion) == (32, 256)
    model = material.random_model(setting, "meta", torch.bfloat16)
    assert model.num_parameters() == SHAPES[name].parameters
    assert next(model.parameters()).dtype == torch.bfloat16
    assert ModelShape.from_config(model.config) == SHAPES[name]


def test_sizes_from_the_command_line() -> None:
    assert models.read_setting(given("--quick")) == models.QUICK
    assert models.read_setting(given()) == models.FULL
    asked = ("--completion", "7", "--ragged", "0", "--prompt-tokens", "9", "--vocab", "99")
    found = models.read_setting(given("--quick", *asked, "--demonstration-tokens", "5"))
    sizes = (found.completion, found.ragged, found.prompt, found.demonstration, found.vocab)
    assert sizes == (7, 0.0, 9, 5, 99)
    assert models.read_setting(given("--model", "some/folder")).english
    with pytest.raises(ValueError, match="give one of them"):
        models.read_setting(given("--model", "x", "--shape", "qwen2.5-7b"))


def test_large_shapes_are_frugal_unless_asked_otherwise() -> None:
    assert models.is_frugal(given("--shape", "qwen2.5-7b"))
    assert not models.is_frugal(given("--shape", "qwen2.5-1.5b"))
    assert not models.is_frugal(given("--shape", "qwen2.5-7b", "--no-frugal"))
    assert models.is_frugal(given("--quick", "--frugal"))


def test_plans_survive_the_way_to_another_process() -> None:
    plan = models.Plan(TINY, "folder", random=True, frugal=True)
    assert models.Plan.loads(plan.dumps()) == plan


def test_random_weights_are_made_and_never_read(tmp_path: Path) -> None:
    plan = models.Plan(TINY, str(material.make_tokenizer(TINY, tmp_path)), random=True)
    module = models.make_module(contenders.RecordingSDFT, plan)
    module.configure_model()
    assert module.model.config.vocab_size == 64
    assert {p.dtype for p in module.model.parameters()} == {torch.float32}
    assert not list(tmp_path.glob("*.safetensors"))


def test_frugal_is_narrow_moments_and_teacher_and_recomputed_activations(tmp_path: Path) -> None:
    folder = str(material.make_model(TINY, tmp_path))
    plan = models.Plan(TINY, folder, frugal=True)
    module = models.make_module(contenders.RecordingSDFT, plan)
    assert isinstance(module.optimizer(module.model.parameters()), AdamWBF16)
    assert module.model.is_gradient_checkpointing
    contender = contenders.Contender(module, plan, 3)
    contender.step()
    assert {p.dtype for p in module.teacher.parameters()} == {torch.bfloat16}
    contender.close()


def test_folders_are_written_where_another_trainer_reads_them() -> None:
    options = given("--shape", "qwen2.5-0.5b")
    with models.plans(options, [TINY]) as (plan,):
        assert plan.random
        assert not list(Path(plan.model).glob("*.safetensors"))
    options.trl_python = "python"
    with models.plans(options, [TINY]) as (plan,):
        assert not plan.random
        assert list(Path(plan.model).glob("*.safetensors"))
    assert not Path(plan.model).exists()
    options = given("--model", "sdft:world")
    with models.plans(options, [TINY, TINY]) as made:
        assert [plan.model for plan in made] == ["sdft:world"] * 2


# ---------------------------------------------------------------- contenders


def test_sft_is_our_best_and_learns_what_was_sampled(tmp_path: Path) -> None:
    plan = models.Plan(TINY, str(material.make_model(TINY, tmp_path)))
    ours = contenders.make_contender("ours", plan, 3)
    sft = contenders.make_contender("sft", plan, 3, lambda: ours.module.completion)
    assert sft.module.fits_states, "packed, its loss in chunks"
    lap = ours.step()
    assert lap.completions == ours.module.completion.lengths_B.tolist()
    assert lap.prompts == [len(ids) for ids in ours.module.batch.student_ids]
    assert set(lap.phases) >= {"generate", "score", "update"}
    assert min(lap.flops["update"], lap.flops["score"]) > 0
    learnt: list[Any] = []
    real = sft.module.targets
    sft.module.targets = lambda batch: learnt.append(real(batch)) or learnt[-1]
    sft.step()
    assert learnt[0].completions() == ours.module.completion.completions()
    for contender in (ours, sft):
        contender.close()


def test_replayed_completions_have_the_lengths_that_are_given() -> None:
    found = list(contenders.replayed([[3, 1], [2, 2]], 5))
    assert [step.lengths_B.tolist() for step in found] == [[3, 1], [2, 2]]
    assert all((step.ids_BT < 5).all() for step in found)
