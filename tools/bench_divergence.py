"""Time and memory of the divergence with its gradients: whole logits against chunks.

    python tools/bench_divergence.py --rows 8192 --vocab 32000 --hidden 512 --json bench.json

    --rows     tokens, N (8192)
    --vocab    vocabulary, V (32000)
    --hidden   width of the hidden states, D (512)
    --alpha    0 forward KL, 1 reverse KL, between: JSD (0)
    --chunk    rows at once (the library's default)
    --dtype    of hidden states and heads: float32, bfloat16 or float64 (float32)
    --repeats  runs of each variant, taken in turn (3)
    --json     also write all figures there

Every run is a process of its own on CPU: it makes its tensors, warms up on a few rows, and then
computes values and the gradients of hidden states and head once. Its extra memory is its peak
resident set less what was resident before that, the gradients included. Prints medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdft.losses import chunked_divergence, token_divergence

VARIANTS = ("naive", "chunked")
MIB = 2**20
WARM_UP_ROWS = 8


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; `--variant` marks the process of one run."""
    summary, _, rest = str(__doc__).partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("rows", 8192), ("vocab", 32000), ("hidden", 512), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--alpha", type=float, default=0.0)
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float64"], default="float32")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# ---------------------------------------------------------------- one run


def resident(field: str) -> int:
    """A figure of this process in bytes: VmRSS, or VmHWM for its peak."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def divergence(args: argparse.Namespace, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Per token, `[N]`."""
    if args.variant == "chunked":
        return chunked_divergence(*student, *teacher, alpha=args.alpha, chunk_size=args.chunk)
    student_logits, teacher_logits = (hidden @ weight.t() for hidden, weight in (student, teacher))
    return token_divergence(student_logits[None], teacher_logits[None], args.alpha)[0]


def step(args: argparse.Namespace, rows: int, student: list[Tensor], teacher: list[Tensor]) -> None:
    """Values and gradients of the first rows."""
    (student_hidden, student_weight), (teacher_hidden, teacher_weight) = student, teacher
    leaf = student_hidden[:rows].detach().requires_grad_()
    values = divergence(args, [leaf, student_weight], [teacher_hidden[:rows], teacher_weight])
    values.sum().backward()


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds and MiB of one run in this process."""
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    sides = [
        [torch.randn(args.rows, args.hidden, dtype=dtype), head(args).to(dtype)] for _ in range(2)
    ]
    student, teacher = sides
    student[1].requires_grad_()
    step(args, WARM_UP_ROWS, student, teacher)
    student[1].grad = None
    before = resident("VmRSS")
    start = time.perf_counter()
    step(args, args.rows, student, teacher)
    seconds = time.perf_counter() - start
    return {"ms": 1000 * seconds, "extra_mib": (resident("VmHWM") - before) / MIB}


def head(args: argparse.Namespace) -> Tensor:
    """Weights that give logits of about unit variance."""
    return torch.randn(args.vocab, args.hidden) / args.hidden**0.5


# ---------------------------------------------------------------- all runs


def run(args: argparse.Namespace, variant: str) -> dict[str, float]:
    """One run in a process of its own."""
    options = {name: getattr(args, name) for name in ("rows", "vocab", "hidden", "alpha", "dtype")}
    if args.chunk is not None:
        options["chunk"] = args.chunk
    command = [sys.executable, __file__, "--variant", variant]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"the {variant} run failed ({result.returncode}): {result.stderr}")
    figures: dict[str, float] = json.loads(result.stdout)
    return figures


def report(args: argparse.Namespace) -> dict[str, Any]:
    """All runs, their medians, and what was run."""
    runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(args.repeats):
        for variant in VARIANTS:
            runs[variant].append(run(args, variant))
    medians = {
        variant: {key: statistics.median(one[key] for one in ones) for key in ("ms", "extra_mib")}
        for variant, ones in runs.items()
    }
    settings = {
        name: value for name, value in vars(args).items() if name not in ("json", "variant")
    }
    threads = torch.get_num_threads()
    return {**settings, "torch": torch.__version__, "threads": threads, "runs": runs} | medians


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args = arguments(argv)
    if args.variant:
        print(json.dumps(measure(args)))
        return
    figures = report(args)
    print(
        f"N {args.rows}, V {args.vocab}, D {args.hidden}, alpha {args.alpha}, {args.dtype}, "
        f"{figures['threads']} threads, median of {args.repeats}"
    )
    for variant in VARIANTS:
        ms, mib = figures[variant]["ms"], figures[variant]["extra_mib"]
        print(f"{variant:>8}  {ms:10.0f} ms  {mib:8.0f} MiB")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
