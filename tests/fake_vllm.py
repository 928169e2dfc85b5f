"""Stands in for the package `vllm`: its interface over a tiny Hugging Face model on the CPU.

It is strict where the real one is silent: memory that sleeps is NaN, a prefix cache is really used,
options and names that vLLM does not know are errors, and it seeds the process when it starts.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM


@dataclass
class SamplingParams:
    """The fields of vLLM's that the engine may use, with vLLM's defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int = 16
    logprobs: int | None = None
    detokenize: bool = True

    def __post_init__(self) -> None:
        if 0 < self.temperature < 0.01:
            self.temperature = 0.01


@dataclass
class Logprob:
    logprob: float


class ServedModel(nn.Module):
    """vLLM's model of the architecture: parameters under names of its own."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.served = AutoModelForCausalLM.from_config(config).to(dtype).eval()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        parameters = dict(self.served.named_parameters())
        loaded = set()
        for name, weight in weights:
            if parameters[name].shape != weight.shape:
                raise ValueError(f"shape of {name}")
            parameters[name].data.copy_(weight)
            loaded.add(f"served.{name}")
        return loaded


class LLM:
    """vLLM's entry point; `calls` says what was done with it, in order."""

    made: list[LLM] = []  # noqa: RUF012 - emptied by the fixture

    def __init__(
        self,
        model: str,
        *,
        load_format: str = "auto",
        dtype: str = "auto",
        skip_tokenizer_init: bool = False,
        generation_config: str = "auto",
        logprobs_mode: str = "raw_logprobs",
        enable_sleep_mode: bool = False,
        gpu_memory_utilization: float = 0.92,
        max_model_len: int | None = None,
        enforce_eager: bool = False,
        seed: int = 0,
    ) -> None:
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        assert load_format == "dummy"
        assert skip_tokenizer_init, "there is no tokenizer in the folder"
        self.config = AutoConfig.from_pretrained(model)
        assert self.config.architectures
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        torch.set_num_threads(torch.get_num_threads() + 1)
        self.model = ServedModel(self.config, getattr(torch, dtype))
        self.mode = logprobs_mode
        self.can_sleep = enable_sleep_mode
        context = self.config.get_text_config().max_position_embeddings
        self.max_model_len = max_model_len or context
        self.asleep: set[str] = set()
        self.backup: list[Tensor] = []
        self.prefixes: dict[tuple[int, ...], Tensor] = {}
        self.calls: list[str] = []
        LLM.made.append(self)

    # ---------------------------------------------------------------- memory

    def sleep(self, level: int = 1) -> None:
        assert self.can_sleep
        assert not self.asleep
        self.calls.append(f"sleep {level}")
        self.asleep = {"weights", "kv_cache"}
        weights = [parameter.data for parameter in self.model.parameters()]
        self.backup = [weight.clone() for weight in weights] if level == 1 else []
        for weight in weights:
            weight.fill_(torch.nan)

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {' '.join(tags)}")
        assert set(tags) <= self.asleep
        self.asleep -= set(tags)
        if "weights" in tags and self.backup:
            for parameter, weight in zip(self.model.parameters(), self.backup, strict=True):
                parameter.data.copy_(weight)
            self.backup = []

    def apply_model(self, func: Callable[[nn.Module], Any]) -> list[Any]:
        assert "weights" not in self.asleep, "unmapped memory"
        self.calls.append("write")
        return [func(self.model)]

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset")
        self.prefixes.clear()
        return True

    # ---------------------------------------------------------------- generation

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[dict[str, list[int]]],
        sampling_params: Sequence[SamplingParams],
        *,
        use_tqdm: bool = True,
    ) -> list[Any]:
        assert not self.asleep
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.is_inference_mode_enabled()
        assert len(prompts) == len(sampling_params)
        self.calls.append("generate")
        memory: dict[tuple[int, ...], Tensor] = {}
        outputs = []
        for prompt, parameters in zip(prompts, sampling_params, strict=True):
            output = self._complete(tuple(prompt["prompt_token_ids"]), parameters, memory)
            outputs.append(SimpleNamespace(outputs=[output]))
        return outputs

    def _complete(
        self, prompt: tuple[int, ...], parameters: SamplingParams, memory: dict[Any, Tensor]
    ) -> Any:
        generator = None
        if parameters.seed is not None:
            generator = torch.Generator().manual_seed(parameters.seed)
        ends = set(parameters.stop_token_ids or ())
        if not parameters.ignore_eos and self.config.eos_token_id is not None:
            ends.add(self.config.eos_token_id)
        ids: list[int] = []
        logprobs: list[dict[int, Logprob]] = []
        while len(ids) < parameters.max_tokens and len(prompt) + len(ids) < self.max_model_len:
            logits_V = self._next(prompt, tuple(ids), memory)
            token, logprob = self._draw(logits_V, parameters, generator)
            ids.append(token)
            logprobs.append({token: Logprob(logprob)})
            if token in ends:
                break
        given = None if parameters.logprobs is None else logprobs
        return SimpleNamespace(token_ids=ids, logprobs=given)

    def _next(
        self, prompt: tuple[int, ...], ids: tuple[int, ...], memory: dict[Any, Tensor]
    ) -> Tensor:
        """Logits after the tokens; those after a prompt are kept until the cache is reset."""
        known = self.prefixes if not ids else memory
        tokens = prompt + ids
        if tokens not in known:
            known[tokens] = self.model.served(torch.tensor([tokens])).logits[0, -1]
        return known[tokens]

    def _draw(
        self, logits_V: Tensor, parameters: SamplingParams, generator: torch.Generator | None
    ) -> tuple[int, float]:
        raw_V = logits_V.float().log_softmax(-1)
        if parameters.temperature == 0:
            token = int(logits_V.argmax())
            return token, float(raw_V[token])
        kept_V = logits_V.float() / parameters.temperature
        if parameters.top_k > 0:
            lowest = kept_V.topk(parameters.top_k).values[-1]
            kept_V = kept_V.masked_fill(kept_V < lowest, -torch.inf)
        if parameters.top_p < 1:
            ordered, order = kept_V.softmax(-1).sort(descending=True)
            kept_V[order[ordered.cumsum(-1) - ordered >= parameters.top_p]] = -torch.inf
        noise_V = torch.empty_like(kept_V).exponential_(generator=generator)
        token = int((kept_V.softmax(-1) / noise_V).argmax())
        processed = self.mode == "processed_logprobs"
        return token, float((kept_V.log_softmax(-1) if processed else raw_V)[token])
