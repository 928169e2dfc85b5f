"""Bases in 4 bits under adapters: run for real where bitsandbytes is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_module, save_model

from sdft import quantization
from sdft.adapters import dense_weight, merged
from sdft.lora import LoRA
from sdft.models import ModelSource
from sdft.quantization import check_quantization


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_quantization(None, False)
    with pytest.raises(ValueError, match="must be nf4 or unset, found 'int3'"):
        check_quantization("int3", True)
    with pytest.raises(ValueError, match=r"needs model\.lora"):
        check_quantization("nf4", False)
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'sdft\[bnb\]'"):
        check_quantization("nf4", True)


def test_a_run_on_a_base_of_4_bits(fit: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    folder = save_model(tmp_path / "m", hidden_size=64, intermediate_size=128)
    module = make_module(folder, lora=LoRA(2, 4.0), quantization="nf4")
    fit(module=module)
    assert module.model.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.uint8
    ids = torch.tensor([[9, 10, 11]])
    student, base = module.model.eval()(ids).logits, module.base(ids).logits  # type: ignore[misc]
    assert (student - base).abs().max() > 1e-3
    whole = merged(module.model)
    torch.testing.assert_close(whole(ids).logits, student, atol=1e-4, rtol=1e-4)
    path = next((tmp_path / "run").rglob("last.ckpt"))
    resumed = make_module(folder, lora=LoRA(2, 4.0), quantization="nf4")
    fit(root="again", module=resumed, ckpt_path=path)
    assert torch.equal(resumed.model.eval()(ids).logits, student)


def test_packed_weights_stand_for_those_of_the_file(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    source = ModelSource(str(save_model(tmp_path / "m", hidden_size=64, intermediate_size=128)))
    packed = source.load_model(torch.float32, quantization="nf4").model.layers[0].mlp.up_proj
    whole = source.load_model(torch.float32).model.layers[0].mlp.up_proj
    error = (dense_weight(packed) - whole.weight).abs().mean() / whole.weight.abs().mean()
    assert 0 < error < 0.15
    inputs = torch.randn(5, 64)
    with torch.no_grad():
        expected = inputs @ dense_weight(packed).T
        torch.testing.assert_close(packed(inputs), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(inputs @ dense_weight(packed).T, expected)  # not packed anew
