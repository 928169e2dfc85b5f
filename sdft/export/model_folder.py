"""The folder that an export leaves: whole or not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sdft.adapter_files import save_adapters
from sdft.adapters import is_adapted
from sdft.atomic import atomic_folder
from sdft.export.model_card import ModelCard
from sdft.lora import LoRA

FACTS = "sdft.json"


def check_target(out: Path, overwrite: bool) -> None:
    """Refuse a place where the folder cannot go, before anything is computed.

    Raises:
        ValueError: A file, or a folder that is not empty (with `overwrite`: that is no model).
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {str(out)!r} is a file: name a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"--out {str(out)!r} is not empty: name another folder, or --overwrite")
    named = any((out / name).is_file() for name in ("config.json", "adapter_config.json"))
    if not named or not any(out.glob("*.safetensors")):
        raise ValueError(
            f"--out {str(out)!r} holds something else than a model: --overwrite would delete it"
        )


def write_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    card: ModelCard,
    out: Path,
    overwrite: bool = False,
) -> None:
    """Write weights, configuration, tokenizer and card; a killed export leaves `out` as it was.

    Raises:
        ValueError: The base's generation settings contradict each other.
        OSError: Not writable, or the disk is full.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(out, replace=overwrite) as folder:
        if is_adapted(model):
            save_adapters(model, LoRA(**card.record.identity["lora"]), card.base_model, folder)
        else:
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for weights in folder.glob("*.safetensors"):  # written for the owner alone
            shutil.copymode(folder / "tokenizer_config.json", weights)
        (folder / "README.md").write_text(card.text(), encoding="utf-8")
        facts = json.dumps(card.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        (folder / FACTS).write_text(facts + "\n", encoding="utf-8")
