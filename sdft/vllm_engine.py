"""Rollouts by vLLM in this process, on the same device, with a copy of the student's weights.

The copy is written anew whenever the student has changed, and sleeps while it trains. vLLM computes
with other kernels and in another precision than the student, so its rollouts carry the
log-probabilities that they were drawn with.
"""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from sdft.agreement import logp_difference
from sdft.randomness import drawn_seeds, kept_generators
from sdft.rollout import (
    Rollout,
    RolloutEngine,
    Sampling,
    gathered_rollout,
    unwrapped,
)
from sdft.whole_weights import Named, fingerprint, has_tied_head, whole_weights

_LOWEST = 0.01  # temperature; vLLM raises what lies below, and would draw otherwise than asked
_FIXED = frozenset(
    {
        "model",
        "load_format",
        "quantization",
        "skip_tokenizer_init",
        "generation_config",
        "logprobs_mode",
        "enable_sleep_mode",
        "distributed_executor_backend",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "gpu_memory_utilization",
        "dtype",
        "max_model_len",
    }
)


class VLLMEngine(RolloutEngine):
    """Rollouts by vLLM (`pip install 'sdft[vllm]'`), one copy of the weights per process.

    vLLM starts with the first rollout, from the student's configuration alone. Seeds come from
    torch's global generator, one per row.

    Args:
        gpu_memory_utilization: Share of the device's memory for vLLM (weights, activations, keys
            and values); it must be free when the first rollout is drawn.
        sleep_level: What vLLM keeps between rollouts: 0 everything, 1 the weights in the CPU's
            memory, 2 nothing (the weights are written anew before each rollout).
        dtype: Precision of vLLM's weights.
        max_model_len: Most tokens of a prompt and its completion together; the model's context
            when unset.
        max_difference: Nats per token by which the log-probabilities of the first rollout may
            differ from the student's on average; more is an error.
        options: Further arguments of `vllm.LLM`, for example `enforce_eager`.

    Raises:
        ValueError: A number out of range, or an option that the engine decides.
    """

    def __init__(
        self,
        gpu_memory_utilization: float = 0.3,
        sleep_level: Literal[0, 1, 2] = 2,
        dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
        max_model_len: int | None = None,
        max_difference: float = 0.5,
        options: dict[str, Any] | None = None,
    ) -> None:
        _check(gpu_memory_utilization, sleep_level, max_difference, options or {})
        self.sleep_level = sleep_level
        self.max_difference = max_difference
        self.settings: dict[str, Any] = {
            "gpu_memory_utilization": gpu_memory_utilization,
            "dtype": dtype,
            "max_model_len": max_model_len,
            **(options or {}),
        }
        self._llm: Any = None
        self._folder: TemporaryDirectory[str] | None = None
        self._asleep = False
        self._held: list[int] | None = None  # fingerprint of the weights that vLLM has
        self._compared = False

    @torch.no_grad()
    def generate(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        eos_ids: Sequence[int],
        pad_id: int,
    ) -> Rollout:
        """Sample one completion per prompt (see `RolloutEngine`), with `logps_BT` unless greedy.

        Raises:
            ValueError: vLLM is not installed, draws otherwise than asked, misses weights, or
                computes another model than the student.
        """
        model = unwrapped(model)
        if 0 < sampling.temperature < _LOWEST:
            raise ValueError(
                f"vLLM draws at a temperature of 0 or of {_LOWEST} and more, found "
                f"{sampling.temperature}"
            )
        vllm = _vllm()
        drawn = sampling.temperature > 0
        seeds = drawn_seeds(len(prompts)) if drawn else [None] * len(prompts)
        parameters = [_parameters(vllm, sampling, eos_ids, seed) for seed in seeds]
        with _alone(model.device):
            llm = self._awake(vllm, model)
            given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
            outputs = llm.generate(given, parameters, use_tqdm=False)
            self._sleep(llm)
        found = [output.outputs[0] for output in outputs]
        completions = [list(output.token_ids) for output in found]
        logps = [_logps(output) for output in found] if drawn else None
        rollout = gathered_rollout(completions, sampling, eos_ids, pad_id, model.device, logps)
        self._compare(model, prompts, rollout, sampling, pad_id)
        return rollout

    # ---------------------------------------------------------------- weights and memory

    def _awake(self, vllm: Any, model: PreTrainedModel) -> Any:
        """vLLM with the weights of `model`, and without keys and values of other ones."""
        if self._llm is None:
            self._llm = self._start(vllm, model)
        if self._asleep:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # vLLM takes its memory from outside of torch's pool
            self._llm.wake_up(tags=["weights"])
        written = self._update(model)
        if (written or self._asleep) and self._llm.reset_prefix_cache() is False:
            raise RuntimeError("vLLM keeps keys and values of the weights before the update")
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        return self._llm

    def _update(self, model: PreTrainedModel) -> bool:
        """Write the weights where they have changed; whether they had."""
        # Nothing is held at level 2, so there is nothing to compare with.
        current = None if self.sleep_level == 2 else fingerprint(whole_weights(model))
        if current is not None and current == self._held:
            return False
        self._held = None
        for missing in self._llm.apply_model(partial(_load, whole_weights(model))):
            if missing:
                raise ValueError(
                    f"vLLM's {type(model).__name__} has weights that the student does not give: "
                    + ", ".join(missing[:5])
                )
        self._held = current
        return True

    def _sleep(self, llm: Any) -> None:
        if self.sleep_level > 0:
            llm.sleep(level=self.sleep_level)
            self._asleep = True

    def _start(self, vllm: Any, model: PreTrainedModel) -> Any:
        # Closures over weights reach a worker of the same process alone.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        self._folder = TemporaryDirectory(prefix="sdft-vllm-")
        _configuration(model).save_pretrained(self._folder.name)
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        backend = {"distributed_executor_backend": "external_launcher"} if ranks > 1 else {}
        threads = torch.get_num_threads()
        try:
            return vllm.LLM(
                model=self._folder.name,
                load_format="dummy",  # the weights follow
                skip_tokenizer_init=True,
                generation_config="vllm",  # none of the model's own defaults
                logprobs_mode="processed_logprobs",  # temperature, top-k and top-p applied
                enable_sleep_mode=self.sleep_level > 0,
                **backend,
                **self.settings,
            )
        finally:
            torch.set_num_threads(threads)

    def _compare(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        rollout: Rollout,
        sampling: Sampling,
        pad_id: int,
    ) -> None:
        """Compare the first rollout that is drawn from the whole distribution with the student."""
        whole = sampling.top_p == 1 and sampling.top_k == 0
        if self._compared or not whole or rollout.logps_BT is None:
            return
        difference = logp_difference(model, prompts, rollout, sampling.temperature, pad_id)
        if not difference <= self.max_difference:  # NaN, too
            raise ValueError(
                f"vLLM's log-probabilities are {difference:.2f} nats per token away from the "
                f"student's, model.engine's max_difference allows {self.max_difference}: it "
                "computes another model, or in too low a precision"
            )
        self._compared = True


def _check(share: float, sleep_level: int, difference: float, options: dict[str, Any]) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"gpu_memory_utilization must lie in (0, 1], found {share}")
    if sleep_level not in (0, 1, 2):
        raise ValueError(f"sleep_level must be 0, 1 or 2, found {sleep_level}")
    if not difference > 0:
        raise ValueError(f"max_difference must be above 0, found {difference}")
    if taken := sorted(_FIXED & set(options)):
        raise ValueError(f"options of VLLMEngine cannot set {', '.join(taken)}: the engine does")


def _vllm() -> Any:
    """The package, imported on first use.

    Raises:
        ValueError: It is not installed.
    """
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise ValueError(
            f"VLLMEngine needs the package vllm: pip install 'sdft[vllm]' ({error})"
        ) from error


def _configuration(model: PreTrainedModel) -> Any:
    """The student's configuration, as that of the dense weights that vLLM is given."""
    config = copy.deepcopy(model.config)
    # Sharding derives a class of its own from the model's.
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = has_tied_head(model)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _parameters(vllm: Any, sampling: Sampling, eos_ids: Sequence[int], seed: int | None) -> Any:
    return vllm.SamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=seed,
        logprobs=None if seed is None else 0,  # of the drawn token alone
        stop_token_ids=list(eos_ids),
        ignore_eos=True,  # only our ends count
        detokenize=False,
    )


def _load(weights: Iterator[Named], module: nn.Module) -> list[str]:
    """Fill vLLM's model; which of its parameters were not."""
    loaded: set[str] | None = module.load_weights(weights)  # type: ignore[operator]
    if loaded is None:  # some models do not say
        return []
    return sorted({name for name, _ in module.named_parameters()} - loaded)


def _logps(output: Any) -> list[float]:
    """What vLLM drew each token with."""
    drawn = zip(output.token_ids, output.logprobs, strict=True)
    return [float(place[token].logprob) for token, place in drawn]


@contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """vLLM as if in a process of its own: without our autocast, inference mode and generators."""
    # It seeds all generators when it starts. What is made in inference mode could not be written to
    # outside of it, and autocast would change its precision.
    with (
        kept_generators(device),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        yield
