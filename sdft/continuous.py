"""Rollouts by transformers' continuous batching: rows that end make room for rows that wait.

Keys and values lie in pages, and a forward pass mixes prompts that are read with rows that are
decoded, so nothing is padded. It runs in a thread of its own, on the student's weights.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import configuration_utils

from sdft.forward import takes_cache
from sdft.kv_cache import attention_windows
from sdft.paging import paging
from sdft.randomness import drawn_seeds, kept_generators
from sdft.rollout import (
    Rollout,
    RolloutEngine,
    Sampling,
    evaluation_mode,
    gathered_rollout,
    generation_config,
    unwrapped,
)

_WINDOWS_FROM = Version("5.16")  # 5.14 and those before gave other tokens than `generate`
_MANAGER = "_cached_continuous_batching_manager"


class ContinuousBatchingEngine(RolloutEngine):
    """Rollouts by the continuous batching of transformers.

    It pays on CUDA with flash attention, which takes weights in half precision. Every rollout has a
    manager and pages of its own, so that no key or value outlives an update of the weights. The
    same seed and prompts give the same rollouts again, but a row's draws depend on its neighbours.

    Args:
        memory_share: Share of the free memory that keys and values may take on an accelerator; rows
            for which none is left wait.
        max_batch_tokens: Most tokens of a forward pass; longer prompts are read in parts.

    Raises:
        ValueError: A number out of range, or a transformers without continuous batching.
    """

    def __init__(self, memory_share: float = 0.5, max_batch_tokens: int = 2048) -> None:
        if not 0 < memory_share <= 1:
            raise ValueError(f"memory_share must lie in (0, 1], found {memory_share}")
        if max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens must be at least 1, found {max_batch_tokens}")
        if not hasattr(GenerationMixin, "init_continuous_batching"):
            raise ValueError(
                "ContinuousBatchingEngine needs a transformers with continuous batching "
                f"(init_continuous_batching), found {transformers.__version__}"
            )
        self.memory_share = memory_share
        self.max_batch_tokens = max_batch_tokens

    @torch.no_grad()
    def generate(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        eos_ids: Sequence[int],
        pad_id: int,
    ) -> Rollout:
        """Sample one completion per prompt (see `RolloutEngine`).

        Raises:
            ValueError: A model that has no keys and values, is sharded, or has attention windows
                that this transformers computes wrongly.
            RuntimeError: What went wrong in the manager's thread.
        """
        model = unwrapped(model)
        _check(model)
        config = generation_config(sampling, eos_ids, pad_id)
        settings = paging(model, prompts, sampling, self.memory_share, self.max_batch_tokens)
        seed = drawn_seeds(1)[0] if sampling.temperature > 0 else 0
        # Tensors of inference mode would not do in a thread without it.
        with (
            evaluation_mode(model),
            _attention_kept(model),
            _no_manager_yet(model),
            _autocast_in_threads(model),
            kept_generators(model.device),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            torch.manual_seed(seed)
            manager = _manager(model, config, settings)
            completions = _completions(manager, prompts, sampling)
        return gathered_rollout(completions, sampling, eos_ids, pad_id, model.device)


def _check(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if not takes_cache(model):
        raise ValueError(
            f"ContinuousBatchingEngine decodes models with keys and values, found {name}: leave "
            "model.engine unset"
        )
    windows = attention_windows(model.config) or []
    if any(windows) and Version(transformers.__version__) < _WINDOWS_FROM:
        raise ValueError(
            f"continuous batching of transformers {transformers.__version__} computes attention "
            f"windows wrongly, and {name} has some: it takes {_WINDOWS_FROM} or newer"
        )
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            f"ContinuousBatchingEngine takes whole weights, found a sharded {name}: leave "
            "model.engine unset"
        )


def _manager(model: PreTrainedModel, config: GenerationConfig, settings: dict[str, Any]) -> Any:
    """A fresh manager; the settings that this transformers does not know are left out."""
    begin = cast(Any, model).init_continuous_batching
    batching = getattr(configuration_utils, "ContinuousBatchingConfig", None)
    if batching is None:  # the first releases read them from the generation config
        for name, value in settings.items():
            setattr(config, name, value)
        return begin(generation_config=config, allow_block_sharing=False)
    known = {field.name for field in dataclasses.fields(batching)}
    if "page_size" in known:
        known.discard("block_size")  # its old name
    chosen = {name: value for name, value in settings.items() if name in known}
    return begin(generation_config=config, continuous_batching_config=batching(**chosen))


def _completions(
    manager: Any, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> list[list[int]]:
    # All rows are there before the start: which rows share a pass, and with it what is drawn, must
    # not depend on how fast they arrive.
    for row, prompt in enumerate(prompts):
        limit = sampling.max_new_tokens
        manager.add_request(list(prompt), request_id=str(row), max_new_tokens=limit)
    found: dict[str, Any] = {}
    with _old_objects_frozen():
        manager.start()
        try:
            while len(found) < len(prompts):
                output = manager.get_result(timeout=1.0)
                if output is not None and output.is_finished():
                    found[output.request_id] = output
                elif output is None and not manager.is_running():
                    break
        finally:
            manager.stop(block=True)
    for output in found.values():
        if output.error is not None:
            raise RuntimeError(f"continuous batching failed: {output.error}")
    if len(found) < len(prompts):
        raise RuntimeError("continuous batching failed: its thread ended early (see its log)")
    return [list(found[str(row)].generated_tokens) for row in range(len(prompts))]


@contextmanager
def _old_objects_frozen() -> Iterator[None]:
    """Spare what exists the garbage collection with which the manager stops."""
    if gc.get_freeze_count():  # somebody's own
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _attention_kept(model: PreTrainedModel) -> Iterator[None]:
    """The manager switches the attention implementation; some versions leave it at that."""
    own = model.config._attn_implementation
    try:
        yield
    finally:
        if model.config._attn_implementation != own:
            model.set_attn_implementation(cast(str, own))


@contextmanager
def _no_manager_yet(model: PreTrainedModel) -> Iterator[None]:
    """A manager that somebody has kept on the model would bring its old keys and values."""
    own = model.__dict__.pop(_MANAGER, None)
    try:
        yield
    finally:
        if own is not None:
            model.__dict__[_MANAGER] = own


@contextmanager
def _autocast_in_threads(model: PreTrainedModel) -> Iterator[None]:
    """This thread's autocast holds for the model's forward pass in every thread."""
    kind = model.device.type
    if not torch.is_autocast_enabled(kind):
        yield
        return
    own = model.__dict__.get("forward")
    cast_forward = _under_autocast(model.forward, kind, torch.get_autocast_dtype(kind))
    cast(Any, model).forward = cast_forward
    try:
        yield
    finally:
        del model.__dict__["forward"]
        if own is not None:
            model.__dict__["forward"] = own
        torch.clear_autocast_cache()  # the optimizer is about to change the weights


def _under_autocast(
    forward: Callable[..., Any], kind: str, dtype: torch.dtype
) -> Callable[..., Any]:
    here = threading.get_ident()
    caches: dict[int, Any] = {}

    @functools.wraps(forward)
    def cast_forward(*args: Any, **options: Any) -> Any:
        if threading.get_ident() != here and not torch.is_autocast_enabled(kind):
            # Left on: the thread ends with the rollout, and the weights are cast but once.
            torch.autocast(kind, dtype=dtype, cache_enabled=True).__enter__()
        cache = options.get("cache")
        if cache is not None and id(cache) not in caches:
            caches[id(cache)] = cache
            cache.update = _storing(cache.update, cache.dtype)
        return forward(*args, **options)

    return cast_forward


def _storing(update: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    """A cache's `update` for keys and values in another precision than its own."""

    def stored(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    def cast_update(*args: Any, **options: Any) -> Any:
        kept = {name: stored(value) for name, value in options.items()}
        return update(*map(stored, args), **kept)

    return cast_update
