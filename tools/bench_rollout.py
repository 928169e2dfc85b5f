"""Tokens per second of the rollout engines, side by side in one process.

    python tools/bench_rollout.py --json rollouts.json
    python tools/bench_rollout.py --quick
    python tools/bench_rollout.py --model sdft:smollm2 --batch 24 --new-tokens 64
    python tools/bench_rollout.py --device cuda --dtype bfloat16 --batch 128 --new-tokens 512

The engines take turns, so that whatever else the machine does falls on all of them alike: compare
the ratios, not the rates. Medians over the repeats; completions are drawn at temperature 1 and
only real tokens count. With `--model` the prompts are random and nothing ends.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from sdft.continuous import ContinuousBatchingEngine
from sdft.decode import DecodeEngine
from sdft.models import DTYPES, WORLD, ModelSource
from sdft.prompts import PromptEncoder, TeacherTemplate
from sdft.rollout import GenerateEngine, RolloutEngine, Sampling
from sdft.world import WorldSkill

ENGINES: dict[str, RolloutEngine] = {
    "ours": DecodeEngine(),
    "ours, weights not copied": DecodeEngine(fused=False),
    "ours, by forward": DecodeEngine(direct=False),
    "generate, dynamic cache": GenerateEngine(),
    "generate, static cache": GenerateEngine("static"),
    "continuous batching": ContinuousBatchingEngine(),
}
VOCABULARY = 8192


@dataclass(frozen=True)
class Workload:
    """What is generated: a model, its prompts, how many tokens and what ends them."""

    name: str
    model: PreTrainedModel
    prompts: list[list[int]]
    new_tokens: int
    eos_ids: Sequence[int] = ()


def world(batch: int = 32) -> Workload:
    """The embedded world as the main configuration trains it."""
    source = ModelSource(WORLD)
    encoder = PromptEncoder(source.load_tokenizer(), TeacherTemplate())
    examples = list(WorldSkill("garden").examples("train"))
    random.Random(0).shuffle(examples)
    prompts = [encoder.student_ids(example) for example in examples[:batch]]
    return Workload(f"world, {batch} x 16", source.load_model(), prompts, 16, [2])


def tiny_qwen2(even: bool, batch: int = 16, new_tokens: int = 128) -> Workload:
    """4 layers of 256; either nothing ends, or a completion ends after about 32 tokens."""
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, **shape, **heads))
    name = f"tiny qwen2, {batch} x {new_tokens}"
    if even:
        return Workload(name, model, random_prompts(batch, 32, 32, VOCABULARY), new_tokens)
    # A fresh model draws almost evenly from its vocabulary: of 32 tokens, one ends.
    eos_ids = range(0, VOCABULARY, 32)
    return Workload(
        f"{name}, ragged", model, random_prompts(batch, 8, 256, VOCABULARY), new_tokens, eos_ids
    )


def tiny_gpt2(batch: int = 16, new_tokens: int = 128) -> Workload:
    """A model that only its own forward pass can run."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=256, n_layer=4, n_head=4))
    prompts = random_prompts(batch, 32, 32, VOCABULARY)
    return Workload(f"tiny gpt2, {batch} x {new_tokens}", model, prompts, new_tokens)


def given(arguments: argparse.Namespace) -> Workload:
    """The model of the command line."""
    model = ModelSource(arguments.model).load_model()
    tokens, batch = arguments.new_tokens, arguments.batch
    prompts = random_prompts(batch, 16, 128, int(model.config.get_text_config().vocab_size))
    return Workload(f"{arguments.model}, {batch} x {tokens}", model, prompts, tokens)


def random_prompts(count: int, shortest: int, longest: int, vocabulary: int) -> list[list[int]]:
    """Prompts of evenly drawn lengths and tokens."""
    rng = random.Random(0)
    lengths = [rng.randint(shortest, longest) for _ in range(count)]
    return [[rng.randrange(3, vocabulary) for _ in range(length)] for length in lengths]


def measure(workload: Workload, repeats: int) -> dict[str, dict[str, float]]:
    """Each engine's tokens per second: `median`, `lowest`, `highest`."""
    rates: dict[str, list[float]] = {name: [] for name in ENGINES}
    for repeat in range(-1, repeats):  # the first is not counted
        for name, engine in ENGINES.items():
            rate = tokens_per_second(engine, workload, seed=repeat + 1)
            if repeat >= 0:
                rates[name].append(rate)
    return {
        name: {"median": statistics.median(found), "lowest": min(found), "highest": max(found)}
        for name, found in rates.items()
    }


def tokens_per_second(engine: RolloutEngine, workload: Workload, seed: int) -> float:
    """Real tokens of one batch over its wall time."""
    torch.manual_seed(seed)
    wait(workload.model.device)
    begin = time.perf_counter()
    rollout = engine.generate(
        workload.model, workload.prompts, Sampling(workload.new_tokens), workload.eos_ids, 0
    )
    wait(workload.model.device)
    seconds = time.perf_counter() - begin
    return float(rollout.mask_BT.sum()) / seconds


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "device": f"{device.type} {name}".strip(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def print_table(name: str, rates: dict[str, dict[str, float]]) -> None:
    """Rates, and how many times as fast ours is."""
    print(f"\n{name}\n| engine | tokens/s | lowest – highest | ours is faster by |")
    print("|---|---|---|---|")
    for engine, rate in rates.items():
        ratio = rates["ours"]["median"] / rate["median"]
        spread = f"{rate['lowest']:.0f} – {rate['highest']:.0f}"
        print(f"| {engine} | {rate['median']:.0f} | {spread} | {ratio:.2f} |")


def workloads(arguments: argparse.Namespace) -> list[Callable[[], Workload]]:
    """What the command line asks for."""
    if arguments.model:
        return [lambda: given(arguments)]
    return [
        world,
        lambda: tiny_qwen2(even=True),
        lambda: tiny_qwen2(even=False),
        tiny_gpt2,
    ]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the numbers there as well")
    parser.add_argument("--quick", action="store_true", help="3 repeats")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--model", help="as `model_name` of the configurations")
    parser.add_argument("--batch", type=int, default=16, help="prompts, with --model")
    parser.add_argument("--new-tokens", type=int, default=128, help="per prompt, with --model")
    return parser.parse_args()


def main() -> None:
    """Measure, print a table for each workload, write the JSON."""
    arguments = parse()
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    report: dict[str, Any] = {"environment": environment(device), "workloads": {}}
    print(report["environment"])
    for make in workloads(arguments):
        workload = make()
        workload.model.to(device, dtype).eval()  # type: ignore[call-arg]
        rates = measure(workload, 3 if arguments.quick else arguments.repeats)
        ratios = {name: rates["ours"]["median"] / rate["median"] for name, rate in rates.items()}
        report["workloads"][workload.name] = {"tokens_per_second": rates, "ratios": ratios}
        print_table(workload.name, rates)
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
