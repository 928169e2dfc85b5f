"""Pretrain the embedded world's model and write it, with its tokenizer, as a Hugging Face folder.

The shipped weights come from two runs on CPU (29 and 14 minutes on a busy machine): the own style
first, then more of it with a share of terse answers to a system turn that asks for them. These
commands give an equivalent base, not the same bytes.

    python tools/make_world.py --out world1 --steps 3000 --brief 0 --compile
    python tools/make_world.py --out sdft/world/model --init world1 --seed 1 --steps 1500 \\
        --lr 1e-3 --decay 0.8 --threads 1 --compile

Prints what the base can do: prior skills, the same when asked to be terse, new skills without a
demonstration (greedy and drawn), and with one.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sdft.world import language
from sdft.world.tokenizer import build_tokenizer

Model = Any  # a LlamaForCausalLM; transformers leaves most of its methods untyped
IGNORE = -100
# What the base meets, and how often. With a demonstration the demonstration always wins.
PLAIN = {
    "prior": 0.40,  # a known word or a basic operation
    "ambiguous": 0.25,  # an ambiguous word, one of its readings drawn by its weight
}
SHOWN = {
    "ambiguous": 0.10,  # the same, with a demonstration of the reading
    "prior": 0.05,
    "anything": 0.20,  # any word with a demonstration of any rule
}
SHOWN_SHARE = sum(SHOWN.values())
BASIC_SHARE = 0.25  # of the prior examples
SAID_OTHERWISE = 0.15  # the said rule is another one: what follows still applies what was said
SYSTEM_SHARE = 0.05  # of the steps: a system turn that changes nothing stands in front


@dataclass(frozen=True)
class Line:
    """One training line: the user's content, the response, and how much of it is given."""

    content: str
    response: str
    given: int


def draw_word(rng: random.Random, kind: str) -> language.Word:
    """A word to ask about: of the home domain or a basic operation, or an ambiguous one."""
    if kind == "prior":
        if rng.random() < BASIC_SHARE:
            return rng.choice(language.words_of(language.BASIC))
        return rng.choice(language.words_of(language.HOME))
    if kind == "ambiguous":
        return rng.choice(language.words_of(rng.choice(language.DOMAINS)))
    return rng.choice(language.WORDS)


def draw_line(rng: random.Random, shown: bool, brief: bool) -> Line:
    """One line of the mix, with a demonstration or without, terse or in the own style."""
    mix = SHOWN if shown else PLAIN
    kind = rng.choices(list(mix), list(mix.values()))[0]
    word, symbols = draw_word(rng, kind), language.draw_symbols(rng)
    if kind == "anything":
        rule = rng.choice([rule for rule in language.RULES if rule != "sort"])  # looks like any
    else:
        rule = rng.choices(word.readings, language.WEIGHTS[: len(word.readings)])[0]
    content = language.prompt_text(word, symbols)
    if shown:
        demonstration = language.terse_text(rule, symbols)
        content = language.TEACHER_TEMPLATE.format(prompt=content, demonstration=demonstration)
    if brief:
        return Line(content, language.terse_text(rule, symbols), 0)
    given = 0
    if rng.random() < SAID_OTHERWISE:
        rule, given = rng.choice(language.RULES), language.LENGTH + 2
    return Line(content, language.own_text(rule, symbols), given)


def collate(
    lines: list[Line], system: str, vocabulary: dict[str, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels [B, T] of lines of one length; only the response is learned."""
    inputs, labels = [], []
    head = f"<system> {system} " if system else ""
    for line in lines:
        prompt = f"{head}<user> {line.content} <assistant>".split()
        response = [*line.response.split(), "<eos>"]
        ids = [vocabulary[token] for token in (*prompt, *response)]
        start = len(prompt) + line.given
        inputs.append(ids)
        labels.append([IGNORE] * start + ids[start:])
    return torch.tensor(inputs), torch.tensor(labels)


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> Model:
    """A Llama-type decoder of random weights, or the one to go on from."""
    torch.manual_seed(args.seed)
    if args.init:
        return LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def rate(step: int, args: argparse.Namespace) -> float:
    """Learning rate: warm-up, plateau, then linear to zero over the last `decay` share."""
    warm = min(1.0, (step + 1) / args.warmup)
    left = (args.steps - step) / (args.steps * args.decay)
    return float(args.lr * min(warm, left, 1.0))


def loss_of(model: Model, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the learned tokens, averaged over them."""
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state[:, :-1]
    logits: torch.Tensor = model.lm_head(hidden).flatten(0, 1)
    return functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORE)


def draw_system(rng: random.Random, brief: float) -> str:
    """The system turn of one step, mostly none; a share `brief` asks for terse answers."""
    shares = {"": 1 - SYSTEM_SHARE - brief, language.SYSTEM: SYSTEM_SHARE, language.BRIEF: brief}
    return rng.choices(list(shares), list(shares.values()))[0]


def backward(
    model: Model, rng: random.Random, args: argparse.Namespace, vocabulary: dict[str, int]
) -> float:
    """Draw a batch and accumulate its gradient; lines of one length go together."""
    system, total = draw_system(rng, args.brief), 0.0
    for shown, share in ((False, 1 - SHOWN_SHARE), (True, SHOWN_SHARE)):
        size = round(args.batch * share)
        lines = [draw_line(rng, shown, system == language.BRIEF) for _ in range(size)]
        loss = share * loss_of(model, *collate(lines, system, vocabulary))
        torch.autograd.backward(loss)
        total += loss.item()
    return total


def pretrain(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> Model:
    """Train from scratch; returns the average of the weights over the last steps."""
    model = build_model(args, tokenizer)
    print(f"{len(tokenizer)} words, {sum(p.numel() for p in model.parameters()):,} parameters")
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [
        {"params": decayed, "weight_decay": args.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    averaged = copy.deepcopy(model).requires_grad_(False)
    if args.compile:
        model.model.forward = torch.compile(model.model.forward, dynamic=False)
    rng, vocabulary, began = random.Random(args.seed), tokenizer.get_vocab(), time.time()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args)
        loss = backward(model, rng, args, vocabulary)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        keep = min(0.995, step / (step + 10))
        for mean, parameter in zip(averaged.parameters(), model.parameters(), strict=True):
            mean.lerp_(parameter.detach(), 1 - keep)
        if step % args.log_every == 0 or step == args.steps - 1:
            print(f"step {step} loss {loss:.4f} {time.time() - began:.0f} s", flush=True)
    return averaged


@torch.no_grad()
def accuracy(
    model: Model,
    tokenizer: PreTrainedTokenizerFast,
    words: list[language.Word],
    shown: bool = False,
    sample: bool = False,
    brief: bool = False,
    each: int = 8,
) -> float:
    """Share of target answers over `each` inputs per word."""
    rng = random.Random(f"{language.SEED}/report")
    contents, answers = [], []
    for word in words:
        for _ in range(each):
            symbols = language.draw_symbols(rng)
            answers.append(
                (language.terse_text if brief else language.own_text)(word.target, symbols)
            )
            content = language.prompt_text(word, symbols)
            if shown:
                terse = language.terse_text(word.target, symbols)
                content = language.TEACHER_TEMPLATE.format(prompt=content, demonstration=terse)
            head = f"<system> {language.BRIEF} " if brief else ""
            contents.append(f"{head}<user> {content} <assistant>")
    batch = tokenizer(contents, return_tensors="pt", padding=True, return_token_type_ids=False)
    torch.manual_seed(0)
    ids = model.generate(**batch, max_new_tokens=16, do_sample=sample, top_k=0 if sample else None)
    said = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(a == b for a, b in zip(said, answers, strict=True)) / len(answers)


def report(model: Model, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """What the base can do."""
    known = list(language.words_of(language.HOME))
    basic = list(language.words_of(language.BASIC))
    ambiguous = [word for domain in language.DOMAINS for word in language.words_of(domain)]
    return {
        "known": accuracy(model, tokenizer, known),
        "basic": accuracy(model, tokenizer, basic, each=64),
        "known, brief": accuracy(model, tokenizer, known, brief=True),
        "basic, brief": accuracy(model, tokenizer, basic, brief=True, each=64),
        "ambiguous, greedy": accuracy(model, tokenizer, ambiguous),
        "ambiguous, drawn": accuracy(model, tokenizer, ambiguous, sample=True),
        "ambiguous, shown": accuracy(model, tokenizer, ambiguous, shown=True),
        "known, shown": accuracy(model, tokenizer, known, shown=True),
    }


def save(model: Model, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> None:
    """Write weights and tokenizer; half precision on disk, float32 when loaded."""
    model.generation_config = GenerationConfig(
        max_new_tokens=16, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    )
    if args.half:
        model.half()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out, save_jinja_files=False)
    path = Path(args.out) / "config.json"  # transformers loads in the dtype named here
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n"
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="sdft/world/model", help="folder to write")
    parser.add_argument("--init", default="", help="folder of a world to go on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--brief", type=float, default=0.12, help="share of terse steps")
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--decay", type=float, default=0.5, help="share of steps that decay")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--intermediate", type=int, default=384)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--half", action="store_true", help="store half precision")
    parser.add_argument("--compile", action="store_true", help="faster, other last digits")
    parser.add_argument("--log-every", type=int, default=200)
    return parser.parse_args()


def main() -> None:
    """Pretrain, report, save."""
    args = parse()
    torch.set_num_threads(args.threads)
    tokenizer = build_tokenizer()
    model = pretrain(args, tokenizer)
    model.eval()
    for name, value in report(model, tokenizer).items():
        print(f"{name}: {value:.3f}")
    save(model, tokenizer, args)


if __name__ == "__main__":
    main()
