"""Soft targets on disk come back as they went."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from sdft.target_file import SoftTargets, write_soft_targets
from sdft.topk import TopK, topk_divergence, topk_targets

LENGTHS = (3, 0, 1, 5)


def logits(length: int) -> torch.Tensor:
    return torch.randn(length, 7, generator=torch.Generator().manual_seed(length))


def write(path: Path, k: int = 2) -> list[TopK | None]:
    targets = [topk_targets(logits(length), k) if length else None for length in LENGTHS]
    write_soft_targets(path, targets)
    return targets


def test_each_answer_gets_its_own_back(tmp_path: Path) -> None:
    targets = write(tmp_path / "t.safetensors")
    stored = SoftTargets(tmp_path / "t.safetensors")
    for place, target in enumerate(targets):
        found = stored.answer(place)
        if target is None:
            assert len(found.ids) == 0
        else:
            assert all(torch.equal(a, b) for a, b in zip(found, target, strict=True))


def test_the_types_on_disk(tmp_path: Path) -> None:
    write(tmp_path / "t.safetensors")
    tensors = load_file(tmp_path / "t.safetensors")
    found = {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert found == {
        "ids": ("torch.int32", (9, 2)),
        "log_probs": ("torch.float32", (9, 2)),
        "tail": ("torch.float32", (9,)),
        "offsets": ("torch.int64", (5,)),
    }


def test_padding_in_a_batch_contributes_nothing(tmp_path: Path) -> None:
    write(tmp_path / "t.safetensors")
    batch = SoftTargets(tmp_path / "t.safetensors").batch([3, 2, 3], torch.device("cpu"))
    assert batch.ids.shape == (3, 5, 2)
    student = torch.zeros(3, 5, 7, requires_grad=True)
    divergence = topk_divergence(student, batch)
    assert divergence[1, 1:].tolist() == [0.0] * 4
    assert torch.equal(divergence[0], divergence[2])
    divergence.sum().backward()
    assert student.grad is not None
    assert student.grad[1, 1:].abs().max() == 0
    assert student.grad[0].abs().max() > 0
    assert torch.isfinite(student.grad).all()
