"""How our SDFT step grows: time and peak memory against batch, completion length and vocabulary.

    python tools/bench_scaling.py --quick --json scaling.json       # minutes on 2 cores
    python tools/bench_scaling.py --shape qwen2.5-0.5b              # on a GPU

One size grows, the others stay; every point is measured in a process of its own, all completions
run to their limit. Prints the points, and for each size the exponents p of `cost ~ size^p`, fitted
by least squares to the logarithms: 1 is proportional, 0 does not grow. `memory above` is what a
step takes for a while, over what is held between two steps (weights, gradients, optimizer states,
teacher, on a CPU also the interpreter). One more point grows batch and vocabulary together: what it
adds to both growths alone would be large if whole logits existed anywhere.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench_alone import Alone, run_alone
from bench_laps import PHASES, exponent, interaction, medians, summary
from bench_material import Setting
from bench_models import Plan, add_arguments, plans, read_setting
from bench_serve import quiet
from bench_step import surroundings

AXES = {"batch": "prompts", "completion": "completion tokens", "vocab": "vocabulary"}
COSTS = ("step", *PHASES, "peak", "above")


@dataclass(frozen=True)
class Point:
    """One measured setting.

    Attributes:
        batch: Prompts per step.
        completion: Tokens of each completion.
        vocab: Tokens in the vocabulary.
        costs: Median seconds of a step and its phases, peak bytes, and bytes above what is held.
    """

    batch: int
    completion: int
    vocab: int
    costs: dict[str, float]

    @classmethod
    def of(cls, setting: Setting, alone: Alone) -> Point:
        """What a process of its own has measured."""
        costs = {"step": summary(alone.laps)["seconds"]}
        costs |= medians([lap.phases for lap in alone.laps])
        costs |= {"peak": float(alone.peak), "above": float(alone.above)}
        return cls(setting.batch, setting.completion, setting.vocab, costs)


def grid(base: Setting, factors: Sequence[int]) -> list[Setting]:
    """The base, each size of it grown by each factor, and batch and vocabulary grown together."""
    grown = [
        replace(base, **{axis: getattr(base, axis) * factor}) for axis in AXES for factor in factors
    ]
    most = max(factors)
    return [base, *grown, replace(base, batch=base.batch * most, vocab=base.vocab * most)]


def along(points: Sequence[Point], base: Point, axis: str) -> list[Point]:
    """The points that differ from the base in one size alone, and the base; by that size."""
    others = [other for other in AXES if other != axis]
    same = [p for p in points if all(getattr(p, o) == getattr(base, o) for o in others)]
    return sorted(same, key=lambda point: getattr(point, axis))


def exponents(points: Sequence[Point], base: Point) -> dict[str, dict[str, float | None]]:
    """The fitted exponent of every cost, for each size."""
    found: dict[str, dict[str, float | None]] = {}
    for axis in AXES:
        line = along(points, base, axis)
        sizes = [getattr(point, axis) for point in line]
        found[axis] = {
            cost: exponent(sizes, [point.costs.get(cost, 0.0) for point in line]) for cost in COSTS
        }
    return found


def together(points: Sequence[Point], base: Point) -> dict[str, float]:
    """What batch and vocabulary grown together add to the memory that each adds alone.

    Returns:
        `added`, in bytes; and `whole_logits`, what one fp32 tensor of all completion tokens' logits
        would have added.
    """
    most = max(points, key=lambda point: point.batch * point.vocab)

    def above(grow_batch: bool, grow_vocab: bool) -> float:
        batch = (most if grow_batch else base).batch
        vocab = (most if grow_vocab else base).vocab
        (found,) = {
            p.costs["above"]
            for p in points
            if (p.batch, p.vocab, p.completion) == (batch, vocab, base.completion)
        }
        return found

    grown = (most.batch - base.batch) * (most.vocab - base.vocab)
    return {"added": interaction(above), "whole_logits": 4.0 * base.completion * grown}


# ---------------------------------------------------------------- what is printed


def table(points: Sequence[Point], found: dict[str, dict[str, float | None]]) -> str:
    """Points and exponents as Markdown."""
    phases = [phase for phase in PHASES if any(phase in point.costs for point in points)]
    lines = [
        f"| {' | '.join(AXES.values())} | step, s | {' | '.join(phases)} | peak memory, MB | "
        "memory above, MB |",
        "|---" * (len(AXES) + len(phases) + 3) + "|",
    ]
    for point in points:
        costs = point.costs
        cells = [str(getattr(point, axis)) for axis in AXES]
        cells += [f"{costs.get(name, 0.0):.3f}" for name in ("step", *phases)]
        cells += [f"{costs[name] / 1e6:.0f}" for name in ("peak", "above")]
        lines.append(f"| {' | '.join(cells)} |")
    names = ["step", *phases, "peak", "above"]
    lines += ["", f"| exponent of | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for axis, title in AXES.items():
        values = [found[axis][name] for name in names]
        shown = ["" if value is None else f"{value:.2f}" for value in values]
        lines.append(f"| {title} | {' | '.join(shown)} |")
    return "\n".join(lines)


def sentence(joint: dict[str, float]) -> str:
    """What growing batch and vocabulary together added."""
    return (
        f"batch and vocabulary grown together add {joint['added'] / 1e6:.0f} MB to what each adds "
        f"alone; one tensor of whole logits would add {joint['whole_logits'] / 1e6:.0f} MB"
    )


# ---------------------------------------------------------------- the run


def measured(made: Sequence[Plan], repeats: int, warmup: int) -> Iterator[Point]:
    """Each plan in a process of its own."""
    for plan in made:
        yield Point.of(plan.setting, run_alone("ours", plan, repeats, warmup))


def base_setting(given: argparse.Namespace) -> Setting:
    """The smallest point: all completions run to their limit."""
    setting = replace(read_setting(given), ragged=given.ragged or 0.0)
    small = {} if given.shape else {"batch": 8, "completion": 32, "vocab": 4096}
    if given.shape:
        small = {"batch": 8, "completion": 64}
    asked = {"batch": given.batch, "completion": given.completion, "vocab": given.vocab}
    return replace(setting, **small | {key: v for key, v in asked.items() if v is not None})


def parse(args: Sequence[str] | None = None) -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--batch", type=int, help="prompts per step, at least")
    parser.add_argument("--factors", type=int, nargs="+", help="by which each size grows")
    parser.add_argument("--repeats", type=int, help="steps per point")
    parser.add_argument("--warmup", type=int, default=1, help="steps before the first that counts")
    parser.add_argument("--json", type=Path, help="where to write the figures as JSON")
    given = parser.parse_args(args)
    if given.model:
        parser.error("--model has one vocabulary: the sizes grow with random weights alone")
    return given


def record(points: Sequence[Point], given: argparse.Namespace) -> dict[str, Any]:
    """What `--json` writes, without the surroundings."""
    base = points[0]
    return {
        "quick": bool(given.quick),
        "shape": given.shape,
        "points": [asdict(point) for point in points],
        "exponents": exponents(points, base),
        "together": together(points, base),
    }


def main(show: Callable[[str], None] = print) -> None:
    """Run the benchmark."""
    quiet()
    given = parse()
    settings = grid(base_setting(given), given.factors or ((2, 4) if given.quick else (2, 4, 8)))
    repeats = given.repeats or (3 if given.quick else 5)
    with plans(given, settings) as made:
        points = list(measured(made, repeats, given.warmup))
    found = record(points, given)
    show(table(points, found["exponents"]))
    show("\n" + sentence(found["together"]))
    if given.json:
        whole = {**surroundings(None), **found}
        given.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
