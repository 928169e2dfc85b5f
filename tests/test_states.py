"""Losses from hidden states are those of whole logits, for every method; none of these exist."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import PACKABLE
from conftest import make_method, make_tokenizer, save_model, sharpen
from test_chunked import Largest
from torch import Tensor
from transformers import PreTrainedModel

import sdft.chunked
import sdft.head_losses
import sdft.states
from sdft import Example, StudentModule
from sdft.base_kl import mean_divergence
from sdft.batch import Batch
from sdft.generated import Answer
from sdft.methods import (
    CPTModule,
    DFTModule,
    ReinvokeModule,
    SFTModule,
    SoftTargetModule,
    TeacherSampleModule,
)
from sdft.methods.reinvoke import ReinvokeModule as Reinvoke
from sdft.rollout import Rollout
from sdft.states import States, track_states
from sdft.target_file import SoftTargets, write_soft_targets

TEXTS = ("c d e f", "g", "a b c d e f g h", "h a")
ANSWERS = ([9, 10, 11, 1], [12], [9, 13, 14], [15, 16, 9, 9, 10, 1])


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step outside a trainer has nowhere to log."""
    for name in ("log", "log_dict"):
        monkeypatch.setattr(StudentModule, name, lambda *args, **options: None)
    monkeypatch.setattr(StudentModule, "logs_this_step", False)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes every head one of no known form, from then on."""
    return lambda: monkeypatch.setattr(sdft.states, "head", lambda model: None)


def save(folder: Path, make: Callable[..., PreTrainedModel], **changes: Any) -> Path:
    make(**changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def build(kind: type[SFTModule], folder: Path, **options: Any) -> Any:
    """A module in fp64 whose student has left its base."""
    template = "{prompt} {context} shown {demonstration} now"
    module: Any = make_method(kind, folder, max_new_tokens=8, teacher_template=template, **options)
    module.configure_model()
    module.double()
    if module.base is not None:
        sharpen(module.base.double(), 2.0)
    sharpen(module.model, 3.0).eval()  # GPT-2 has dropout
    return module


def batch_of(module: Any, origin: Any = "new") -> Batch:
    examples = [
        Example(({"role": "user", "content": text[::-1]},), "x", text, f"{text} now {text}")
        for text in TEXTS
    ]
    return Batch(
        examples,
        [module.encoder.student_ids(example) for example in examples],
        [module.encoder.teacher_ids(example) for example in examples],
        [origin] * len(examples),
    )


def answered(module: Any) -> Any:
    """Every row has an answer, by its place."""
    module.book = SimpleNamespace(answers=[Answer(ids, "", False) for ids in ANSWERS])
    module.answered = lambda batch, prompts, index: (batch, list(range(len(batch))))
    return module


def stored(module: Any, path: Path) -> Any:
    prompts, places = batch_of(module).student_ids, range(len(ANSWERS))
    targets = module._soft(prompts, answered(module).completions(places))
    write_soft_targets(path / "targets.safetensors", targets)
    module._stored = SoftTargets(path / "targets.safetensors")
    return module


METHODS: dict[str, Callable[[Path, Path], tuple[Any, Any]]] = {
    "sft": lambda model, path: (build(SFTModule, model), "new"),
    "dft": lambda model, path: (build(DFTModule, model), "new"),
    "cpt": lambda model, path: (build(CPTModule, model, max_text_tokens=6), "new"),
    "reinvoke": lambda model, path: (
        build(Reinvoke, model, alpha=0.3, temperature=0.8, skip_first_tokens=1),
        "general",
    ),
    "hard samples": lambda model, path: (answered(build(TeacherSampleModule, model)), "new"),
    "soft samples": lambda model, path: (
        answered(build(TeacherSampleModule, model, loss="soft", temperature=1.4)),
        "new",
    ),
    "stored targets": lambda model, path: (
        stored(
            build(SoftTargetModule, model, targets_per_token=3, temperature=0.7, weight=1.0), path
        ),
        "general",
    ),
    "snapshot": lambda model, path: (
        answered(build(SoftTargetModule, model, targets="snapshot", temperature=0.7, weight=1.0)),
        "general",
    ),
}


def step(module: Any, origin: Any) -> tuple[Tensor, list[Tensor | None]]:
    """The loss of one step and the gradient of every parameter."""
    torch.manual_seed(3)
    module.zero_grad()
    loss = module.training_step(batch_of(module, origin), 0)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in module.model.parameters()]


def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the respondent's two passes are made."""
    made: list[str] = []
    for name in ("completion_hidden", "completion_logits"):
        real = getattr(sdft.respondent, name)

        def spy(*args: Any, name: str = name, real: Any = real) -> Any:
            made.append(name)
            return real(*args)

        monkeypatch.setattr(sdft.respondent, name, spy)
    return made


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0].double(), expected[0].double(), rtol=1e-6, atol=1e-7)
    for one, other in zip(found[1], expected[1], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).norm() <= 1e-6 * (1 + other.norm())


# ---------------------------------------------------------------- losses and gradients


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_hidden_states_and_whole_logits_give_one_loss_and_one_gradient(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: Callable[[], None],
    method: str,
    architecture: str,
) -> None:
    module, origin = METHODS[method](save(tmp_path / "m", PACKABLE[architecture]), tmp_path)
    made = passes(monkeypatch)
    found = step(module, origin)
    assert set(made) == {"completion_hidden"}
    made.clear()
    whole()
    expected = step(module, origin)
    assert set(made) == {"completion_logits"}
    assert expected[0] > 1e-3
    assert_same(found, expected)


@pytest.mark.parametrize("method", ["dft", "stored targets"])
@pytest.mark.parametrize("architecture", sorted(set(PACKABLE) - {"llama", "qwen2"}))
def test_so_do_other_architectures(
    tmp_path: Path, whole: Callable[[], None], method: str, architecture: str
) -> None:
    module, origin = METHODS[method](save(tmp_path / "m", PACKABLE[architecture]), tmp_path)
    if architecture == "gemma2":  # its own padded pass gives NaN in fp64
        assert_rounded(in_fp32(module), origin, whole)
        return
    found = step(module, origin)
    whole()
    assert_same(found, step(module, origin))


def in_fp32(module: Any) -> Any:
    for model in (module, *module._base):
        model.float()
    return module


def assert_rounded(module: Any, origin: Any, whole: Callable[[], None]) -> None:
    found = step(module, origin)
    whole()
    loss, gradients = step(module, origin)
    torch.testing.assert_close(found[0], loss, rtol=1e-5, atol=1e-6)
    for one, other in zip(found[1], gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_fp32_differs_by_rounding_alone(
    tmp_path: Path, model_dir: Path, whole: Callable[[], None], method: str
) -> None:
    module, origin = METHODS[method](model_dir, tmp_path)
    assert_rounded(in_fp32(module), origin, whole)


def test_stored_targets_are_the_same_from_either(
    tmp_path: Path, model_dir: Path, whole: Callable[[], None]
) -> None:
    module = answered(build(SoftTargetModule, model_dir, targets_per_token=4, temperature=0.6))
    prompts, completion = batch_of(module).student_ids, module.completions(range(len(ANSWERS)))
    found = module._soft(prompts, completion)
    whole()
    expected = module._soft(prompts, completion)
    assert [len(target.ids) for target in found] == [len(ids) for ids in ANSWERS]
    for one, other in zip(found, expected, strict=True):
        for part, of_logits in zip(one, other, strict=True):
            torch.testing.assert_close(part, of_logits)


def test_the_distance_to_the_base_is_the_same_from_either(
    model_dir: Path, whole: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build(SFTModule, model_dir)
    prompts, made = batch_of(module).student_ids, passes(monkeypatch)
    found = mean_divergence(module, prompts, ANSWERS, 3)
    assert made == ["completion_hidden"] * 4
    whole()
    assert mean_divergence(module, prompts, ANSWERS, 3) == pytest.approx(found, rel=1e-6)
    assert made[4:] == ["completion_logits"] * 4
    assert found > 1e-3


def test_what_is_tracked_is_the_same_from_either(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build(SFTModule, model_dir)
    logged: list[dict[str, Tensor]] = []
    monkeypatch.setattr(
        StudentModule, "log_dict", lambda self, values, **options: logged.append(values)
    )
    for logs in (True, False):
        monkeypatch.setattr(StudentModule, "logs_this_step", logs)
        prompts, target = batch_of(module).student_ids, module.targets(batch_of(module))
        with torch.no_grad():
            student = sdft.states.states(module, module.model, prompts, target)
            logits_BTV = module.logits(module.model, prompts, target)
        track_states(module, {"train/loss": torch.ones(())}, prompts, target, student)
        module.track({"train/loss": torch.ones(())}, prompts, target, logits_BTV)
    for found, expected in (logged[:2], logged[2:]):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert float(value) == pytest.approx(float(expected[name]), rel=1e-5)
    assert set(logged[0]) == {"train/loss", "train/entropy", "train/kl_base_student"}
    assert set(logged[2]) == {"train/loss"}


def test_nothing_to_learn_gives_zero(model_dir: Path) -> None:
    """A demonstration of no token, from a tokenizer that ends nothing."""
    module = build(SFTModule, model_dir)
    module.tokenizer.eos_token = None
    batch = batch_of(module)
    batch.examples = [Example(e.messages, "x", "") for e in batch.examples]
    loss = module.training_step(batch, 0)
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in module.model.parameters() if p.grad is not None)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("method", METHODS)
def test_no_whole_logits_ever_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Callable[[], None], method: str
) -> None:
    """Also not for what is logged."""
    vocabulary, width = 2000, 8
    small = {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 8}
    module, origin = METHODS[method](save_model(tmp_path / "m", **small), tmp_path)
    monkeypatch.setattr(sdft.chunked, "CPU_ROWS", 2)
    monkeypatch.setattr(sdft.head_losses, "_ROWS", 2)
    monkeypatch.setattr(StudentModule, "logs_this_step", True)
    if isinstance(module, Reinvoke):  # sampling has a row of logits per prompt
        ids = torch.full((len(TEXTS), 8), 9)
        rollout = Rollout(ids, torch.ones_like(ids).bool(), torch.ones(len(TEXTS)).bool())
        monkeypatch.setattr(module, "sample", lambda *args: rollout)
    with Largest() as parts:
        step(module, origin)
    assert parts.entries <= vocabulary * width
    whole()
    with Largest() as all_logits:
        step(module, origin)
    assert all_logits.entries > vocabulary * width


# ---------------------------------------------------------------- losses of one's own


class OwnLoss(SFTModule):
    def token_loss(self, logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
        return 2 * super().token_loss(logits_BTV, target_BT)


class OwnDFT(DFTModule):
    def token_loss(self, logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
        return 2 * super().token_loss(logits_BTV, target_BT)


class OwnStates(SFTModule):
    def state_loss(self, student: States, targets_N: Tensor, weights_N: Tensor) -> Tensor:
        return 2 * super().state_loss(student, targets_N, weights_N)


class OwnBoth(OwnLoss, OwnStates):
    pass


class OwnPair(OwnStates):
    def token_loss(self, logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
        return 2 * super().token_loss(logits_BTV, target_BT)

    def state_loss(self, student: States, targets_N: Tensor, weights_N: Tensor) -> Tensor:
        return super().state_loss(student, targets_N, weights_N)


class OwnLogits(SFTModule):
    def logits(self, *args: Any) -> Tensor:
        return super().logits(*args) * 0.5


class OwnTrack(SFTModule):
    def track(self, *args: Any) -> None:
        return


@pytest.mark.parametrize(
    ("kind", "from_states"),
    [
        (SFTModule, True),
        (DFTModule, True),
        (CPTModule, True),
        (OwnLoss, False),
        (OwnDFT, False),
        (OwnStates, True),
        (OwnBoth, False),
        (OwnPair, True),
        (OwnLogits, False),
        (OwnTrack, False),
    ],
)
def test_an_override_of_the_logits_loss_keeps_whole_logits(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, kind: type[SFTModule], from_states: bool
) -> None:
    module, made = build(kind, model_dir), passes(monkeypatch)
    assert module.fits_states is from_states
    found, _ = step(module, "new")
    assert set(made) == {"completion_hidden" if from_states else "completion_logits"}
    plain, _ = step(build(DFTModule if kind is OwnDFT else SFTModule, model_dir), "new")
    if kind.__name__.startswith("Own") and kind not in (OwnLogits, OwnTrack):
        torch.testing.assert_close(found, 2 * plain, rtol=1e-6, atol=1e-6)
    elif kind is OwnLogits:
        assert not torch.allclose(found, plain, rtol=1e-2)


def test_other_methods_keep_them_too(model_dir: Path) -> None:
    class OwnDivergence(ReinvokeModule):
        def divergence(self, *args: Any) -> Tensor:
            return super().divergence(*args)

    class SoftLogits(SoftTargetModule):
        logits = OwnLogits.logits

    class SampleLogits(TeacherSampleModule):
        logits = OwnLogits.logits

    for kind in (ReinvokeModule, SoftTargetModule, TeacherSampleModule):
        assert build(kind, model_dir).distils_states
    for kind in (OwnDivergence, SoftLogits, SampleLogits):
        assert not inspect.isabstract(kind)
        assert not build(kind, model_dir).distils_states
