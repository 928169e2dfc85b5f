"""Time of the backbone's hidden states for a batch's completions: padded against packed.

    python tools/bench_scoring.py --json bench.json

    --quick    few repeats: half a minute on one core
    --repeats  runs of each variant, taken in turn (15)
    --threads  of the CPU (1)
    --clock    wall, or cpu: seconds of CPU, steadier on a busy machine (wall)
    --device   cpu or cuda (cpu)
    --dtype    of the weights: float32, bfloat16 or float16 (float32)
    --json     also write all figures there

Variants: `masked` (prompts padded on the left, completions on the right, as in sdft.scoring),
`padded` and `packed` (sdft.packing), and `auto`, which chooses one of these two. Batches: the
embedded world's prompts for student and teacher with the world's own completions (32), and for a
Qwen2 of 4 layers of width 256 16 rows of ragged and of equal lengths. Prints medians, of a forward
pass alone (the teacher's) and of one with its backward pass (the student's), and how many times
faster than `masked` each variant is.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from sdft import SDFTModule
from sdft.batch import pad
from sdft.packing import Layout, completion_hidden, packing_pays
from sdft.rollout import Rollout
from sdft.world import TEACHER_TEMPLATE, WorldSkill

VARIANTS = ("masked", "padded", "packed", "auto")
WORLD_ROWS, RAGGED_ROWS = 32, 16
VOCABULARY = 8192


class Case(NamedTuple):
    """A batch to be scored by a model."""

    name: str
    model: PreTrainedModel
    prompts: list[list[int]]
    completion: Rollout

    @property
    def lengths(self) -> tuple[list[int], list[int]]:
        """Of prompts and of completions."""
        return [len(prompt) for prompt in self.prompts], self.completion.lengths_B.tolist()

    def to(self, device: str, dtype: torch.dtype) -> Case:
        """The same on a device, in a precision."""
        tensors = (self.completion.ids_BT, self.completion.mask_BT, self.completion.truncated_B)
        completion = Rollout(*(tensor.to(device) for tensor in tensors))
        cast(Any, self.model).to(device, dtype)
        return self._replace(completion=completion)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    summary, _, rest = str(__doc__).partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


# ---------------------------------------------------------------- batches


def world_cases() -> list[Case]:
    """Student and teacher of the embedded world on its first skill."""
    module = SDFTModule(
        model_name="sdft:world", max_new_tokens=16, teacher_template=TEACHER_TEMPLATE
    )
    examples = WorldSkill(domain="garden").examples("train")[:WORLD_ROWS]
    student = [module.encoder.student_ids(example) for example in examples]
    teacher = [module.encoder.teacher_ids(example) for example in examples]
    torch.manual_seed(0)
    completion = module.sample(module.model, student, module.sampling)
    return [
        Case("world, student", module.model, student, completion),
        Case("world, teacher", module.model, teacher, completion),
    ]


def qwen2_cases() -> list[Case]:
    """Ragged lengths, most of which are short, and equal ones, where packing saves nothing."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = Qwen2ForCausalLM(config)
    rng = random.Random(0)
    prompts = [rng.randrange(20, 100) for _ in range(RAGGED_ROWS)]
    completions = [230] + [4 + int(rng.expovariate(1 / 40)) for _ in range(RAGGED_ROWS - 1)]
    return [
        _case("qwen2, ragged", model, prompts, completions, rng),
        _case("qwen2, equal", model, [64] * RAGGED_ROWS, [64] * RAGGED_ROWS, rng),
    ]


def _case(
    name: str,
    model: PreTrainedModel,
    prompts: list[int],
    completions: list[int],
    rng: random.Random,
) -> Case:
    def draw(lengths: list[int]) -> list[list[int]]:
        return [[rng.randrange(VOCABULARY) for _ in range(length)] for length in lengths]

    ids_BT, mask_BT = pad(draw(completions), 0, "right", torch.device("cpu"))
    none_B = torch.zeros(len(completions), dtype=torch.bool)
    return Case(name, model, draw(prompts), Rollout(ids_BT, mask_BT, none_B))


# ---------------------------------------------------------------- variants


def hidden(case: Case, variant: str) -> Tensor:
    """Hidden states that predict the completion tokens, `[N, D]`."""
    if variant == "masked":
        return masked_hidden(case)
    layouts: dict[str, Layout] = {"padded": "padded", "packed": "packed", "auto": "auto"}
    return completion_hidden(case.model, case.prompts, case.completion, layouts[variant])


def masked_hidden(case: Case) -> Tensor:
    """As `completion_logits` lays them out, without the head."""
    ids_BT, mask_BT = case.completion.ids_BT, case.completion.mask_BT
    prompt_ids, prompt_mask = pad(case.prompts, 0, "left", ids_BT.device)
    mask = torch.cat([prompt_mask, mask_BT], dim=1).long()
    output = case.model.base_model(
        input_ids=torch.cat([prompt_ids, ids_BT], dim=1),
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        use_cache=False,
    )
    states: Tensor = output.last_hidden_state[:, -ids_BT.shape[1] - 1 : -1][mask_BT]
    return states


def forward(case: Case, variant: str) -> None:
    """The teacher's pass."""
    with torch.no_grad():
        hidden(case, variant)


def forward_and_backward(case: Case, variant: str) -> None:
    """The student's pass."""
    case.model.zero_grad()
    hidden(case, variant).float().square().mean().backward()


# ---------------------------------------------------------------- figures


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of every variant, taken in turn."""
    prompts, completions = case.lengths
    real, columns = sum(prompts) + sum(completions), max(prompts) + max(completions)
    figures: dict[str, Any] = {
        "case": case.name,
        "rows": len(prompts),
        "tokens": real,
        "waste": len(prompts) * columns / real,
        "lengths": len({p + c for p, c in zip(prompts, completions, strict=True)}),
        "auto": "packed" if packing_pays(prompts, completions) else "padded",
    }
    for passes in (forward, forward_and_backward):
        seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for repeat in range(options.repeats + 1):
            for variant in VARIANTS:
                elapsed = timed(lambda run=passes, v=variant: run(case, v), options)  # type: ignore[misc]
                if repeat > 0:  # the first warms up
                    seconds[variant].append(elapsed)
        figures[passes.__name__] = {v: statistics.median(times) for v, times in seconds.items()}
    return figures


def timed(run: Callable[[], None], options: argparse.Namespace) -> float:
    """Seconds of one run."""
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    start = clock()
    run()
    if options.device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def show(figures: dict[str, Any]) -> None:
    """One batch's table."""
    print(
        f"\n{figures['case']}: {figures['rows']} rows, {figures['tokens']} tokens, padding waste "
        f"{figures['waste']:.2f}, {figures['lengths']} lengths; auto is {figures['auto']}"
    )
    for passes in ("forward", "forward_and_backward"):
        times = figures[passes]
        cells = [
            f"{variant} {seconds * 1e3:7.1f} ms ({times['masked'] / seconds:.2f}×)"
            for variant, seconds in times.items()
        ]
        print(f"  {passes:20s} " + "  ".join(cells))


def main() -> None:
    """Measure every batch, print a table each, and write the JSON if asked."""
    options = arguments()
    options.repeats = options.repeats or (3 if options.quick else 15)
    torch.set_num_threads(options.threads)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    device = (
        torch.cuda.get_device_name()
        if options.device == "cuda"
        else platform.processor() or platform.machine()
    )
    print(
        f"{versions}, {device}, {options.threads} threads, {options.dtype}, {options.clock} clock"
    )
    results = []
    for case in (*world_cases(), *qwen2_cases()):
        results.append(measure(case.to(options.device, getattr(torch, options.dtype)), options))
        show(results[-1])
    if options.json is not None:
        settings = {key: str(value) for key, value in vars(options).items()}
        report = {"settings": settings, "versions": versions, "device": device, "cases": results}
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
