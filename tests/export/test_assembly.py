"""From weights to a model: refused where it would not be the checkpoint's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_qwen2, save_model

from sdft.export.assembly import assemble, widest
from sdft.models import ModelSource
from sdft.weights import identity


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return dict(make_model(seed=5).state_dict())


def put_together(model_dir: Path, weights: dict[str, torch.Tensor], **options: Any) -> Any:
    return assemble(ModelSource(str(model_dir)), weights, identity(make_model()), **options)


def test_the_weights_arrive(model_dir: Path, weights: dict[str, torch.Tensor]) -> None:
    found = put_together(model_dir, weights)
    assert not found.training
    assert all(torch.equal(value, weights[name]) for name, value in found.state_dict().items())


def test_the_widest_type() -> None:
    half, brain, full = (
        torch.ones(1, dtype=getattr(torch, n)) for n in ("half", "bfloat16", "float")
    )
    assert widest([half]) == torch.float16
    assert widest([brain, brain]) == torch.bfloat16
    assert widest([half, brain]) == torch.float32
    assert widest([brain, full, torch.ones(1, dtype=torch.long)]) == torch.float32


@pytest.mark.parametrize("change", ["lacks", "extra", "shape"])
def test_weights_that_do_not_fit(
    model_dir: Path, weights: dict[str, torch.Tensor], change: str
) -> None:
    if change == "lacks":
        del weights["model.norm.weight"]
    elif change == "extra":
        weights["model.other.weight"] = torch.ones(2)
    else:
        weights["model.norm.weight"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"do not fit the model .*model\.(norm|other)\.weight"):
        put_together(model_dir, weights)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "model.layers.0.self_attn.q_proj.base_layer.weight",
        "model.layers.0.self_attn.q_proj.up_OR",
    ],
)
@pytest.mark.parametrize("merge", [True, False])
def test_adapters_that_no_run_of_ours_made_are_refused(
    model_dir: Path, weights: dict[str, torch.Tensor], name: str, merge: bool
) -> None:
    with pytest.raises(ValueError, match=rf"holds adapters \({name}\) of an unknown kind"):
        put_together(model_dir, {**weights, name: torch.ones(2, 2)}, merge=merge)


def test_quantised_weights_are_refused(model_dir: Path, weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight.absmax"
    with pytest.raises(ValueError, match="holds quantised weights"):
        put_together(model_dir, {**weights, name: torch.ones(2)})


def test_values_that_are_not_finite(model_dir: Path, weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"][0] = 1e6
    assert put_together(model_dir, weights, dtype=torch.bfloat16) is not None
    with pytest.raises(ValueError, match=r"model\.norm\.weight overflows in float16"):
        put_together(model_dir, weights, dtype=torch.float16)
    weights["model.norm.weight"][0] = torch.nan
    with pytest.raises(ValueError, match=r"model\.norm\.weight is not finite in float32"):
        put_together(model_dir, weights)


def test_a_tied_head_that_has_drifted(tmp_path: Path) -> None:
    base = save_model(tmp_path / "tied", family="qwen2")
    model = make_qwen2(seed=4)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assemble(ModelSource(str(base)), weights, identity(model))
    weights["lm_head.weight"] += 1
    with pytest.raises(ValueError, match="is tied to another weight"):
        assemble(ModelSource(str(base)), weights, identity(model))
