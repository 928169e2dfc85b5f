"""`python -m sdft generate --model my_model --prompt "…"`: a quick look at what a model answers.

Prompts come from `--prompt`, from a JSONL file, from the lines of the standard input, or, in a
terminal, from a conversation.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace

from sdft import cli
from sdft.evaluation import Response
from sdft.examples import Example, Message, as_messages
from sdft.jsonl import RecordFields, read_jsonl
from sdft.models import ModelSource
from sdft.prompts import Sees, TeacherTemplate
from sdft.rollout import Sampling
from sdft.seeding import derive_seed
from sdft.self_edits.author import Author

RESET = "/reset"


def main(args: list[str]) -> int:
    """Answer what a command line asks; returns the exit status.

    Args:
        args: What stands behind `generate`.

    Raises:
        ValueError: No such model, or prompts that cannot be read or do not fit.
    """
    options = _parser().parse_args(args)
    talk = Talk(options)
    try:
        if options.prompt or options.prompts:
            talk.answer_all(list(_given(options)))
        elif sys.stdin.isatty():
            talk.converse()
        else:
            talk.answer_all([talk.example(text) for text in _stdin_lines()])
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


class Talk:
    """Prompts that one model answers, seen as the student or as the teacher sees them.

    Args:
        options: The command line's.

    Raises:
        ValueError: A number out of range, or a model that is not there.
    """

    def __init__(self, options: Namespace) -> None:
        self.options = options
        if options.batch_size < 1:
            raise ValueError(f"--batch_size must be at least 1, found {options.batch_size}")
        shown = options.demonstration is not None or bool(options.context)
        self.view: str = options.view or ("teacher" if shown else "student")
        if self.view == "student" and shown:
            raise ValueError("--demonstration and --context are the teacher's: use --view teacher")
        source = ModelSource(options.model, options.trust_remote_code, options.revision)
        sampling = Sampling(
            options.max_new_tokens, options.temperature, options.top_p, options.top_k
        )
        self.author = Author(source, sampling, options.dtype, options.device)

    # ---------------------------------------------------------------- prompts

    def example(self, text: str) -> Example:
        """A prompt on its own, with what the command line shows the teacher."""
        return _framed(Example(as_messages(text), answer=""), self.options)

    def encode(self, example: Example) -> list[int]:
        """Token ids of the prompt as this view has it.

        Raises:
            ValueError: It leaves no room for the answer, or there is nothing to show the teacher.
        """
        if self.view == "student":
            ids = self.author.encoder.student_ids(example)
        else:
            self.author.encoder.template = TeacherTemplate(
                self.options.teacher_template, _sees(example)
            )
            ids = self.author.encoder.teacher_ids(example)
        room = self.author.prompt_room
        if room is not None and len(ids) > room:
            raise ValueError(
                f"the prompt {example.prompt[:60]!r} has {len(ids)} tokens; with --max_new_tokens "
                f"{self.options.max_new_tokens} the model's context leaves room for {max(room, 0)}"
            )
        return ids

    # ---------------------------------------------------------------- answers

    def answer_all(self, examples: Sequence[Example]) -> None:
        """Answer in batches, and print in order.

        Raises:
            ValueError: There is nothing to answer.
        """
        if not examples:
            raise ValueError("there is no prompt: the standard input is empty")
        prompts = [self.encode(example) for example in examples]
        for start in range(0, len(examples), self.options.batch_size):
            batch = slice(start, start + self.options.batch_size)
            responses = self.respond(prompts[batch], start)
            for item in zip(examples[batch], prompts[batch], responses, strict=True):
                self.show(*item, titled=len(examples) > 1)

    def respond(self, prompts: list[list[int]], number: int) -> list[Response]:
        """Answer one batch; what is drawn is a function of seed, number and prompts."""
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(self.options.seed, "generate", number))
            return self.author.respond(prompts, self.author.sampling)

    def show(self, example: Example, ids: list[int], response: Response, titled: bool) -> None:
        """Print an answer, as text or as a line of JSON."""
        seen = self.author.tokenizer.decode(ids) if self.options.show_prompt else None
        if self.options.json:
            record = {
                "prompt": [dict(message) for message in example.messages],
                "view": self.view,
                "response": response.text,
                "tokens": response.tokens,
                "truncated": response.truncated,
                **({} if seen is None else {"seen": seen}),
            }
            print(json.dumps(record, ensure_ascii=False), flush=True)
            return
        if titled:
            print(f"> {example.prompt}")
        if seen is not None:
            print(f"{seen}\n---")
        print(response.text + ("\n" if titled else ""), flush=True)
        if response.truncated:
            print(f"(cut after {response.tokens} tokens: --max_new_tokens)", file=sys.stderr)

    def converse(self) -> None:
        """A conversation in the terminal; the end of input (Ctrl-D) ends it."""
        print(f"{self.options.model}: {RESET} begins anew, Ctrl-D ends", file=sys.stderr)
        said: tuple[Message, ...] = ()
        for number, text in enumerate(_typed()):
            if not text or text == RESET:
                said = said if not text else ()
                continue
            turn = {"role": "user", "content": text}
            example = _framed(Example((*said, turn), answer=""), self.options)
            ids = self.encode(example)
            (response,) = self.respond([ids], number)
            self.show(example, ids, response, titled=False)
            said = (*said, turn, {"role": "assistant", "content": response.text})


def _typed() -> Iterator[str]:
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return


def _stdin_lines() -> list[str]:
    return [line.strip() for line in sys.stdin if line.strip()]


def _given(options: Namespace) -> Iterator[Example]:
    if options.prompt and options.prompts:
        raise ValueError("give --prompt or --prompts, not both")
    for text in options.prompt or ():
        yield _framed(Example(as_messages(text), answer=""), options)
    for place, record in read_jsonl(options.prompts) if options.prompts else ():
        example = RecordFields().example({"answer": "", **record}, place, training=False)
        yield _framed(replace(example, demonstration=example.demonstration or None), options)


def _framed(example: Example, options: Namespace) -> Example:
    """The example with the command line's system turn, demonstration and context."""
    messages = example.messages
    if options.system is not None and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": options.system}, *messages)
    demonstration = example.demonstration
    if options.demonstration is not None:
        demonstration = options.demonstration
    return Example(messages, example.answer, demonstration, options.context or example.context)


def _sees(example: Example) -> Sees:
    """What there is to show the teacher."""
    if example.demonstration is None and not example.context:
        raise ValueError(
            f"the teacher's view of {example.prompt[:60]!r} needs a demonstration or a context"
        )
    return "text" if example.demonstration is None else "text_and_answer"


def _parser() -> Any:
    parser = cli.Parser(prog="sdft generate", description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--model", type=str, required=True, help="a model folder, .gguf file, hub name or sdft:…")
    add("--prompt", type=str, action="append", help="a prompt; may be repeated")
    add("--prompts", type=Path | None, default=None, help="JSONL file: `prompt` or `messages`")
    add("--system", type=str | None, default=None, help="a system turn before each prompt")
    add("--demonstration", type=str | None, default=None, help="shown to the teacher")
    add("--context", type=str, default="", help="text shown to the teacher")
    add(
        "--view",
        type=Literal["student", "teacher"] | None,
        default=None,
        help="whose prompt the model answers; the teacher's with a demonstration or a context",
    )
    add("--teacher_template", type=str | None, default=None, help="as model.teacher_template")
    add("--show_prompt", action="store_true", help="print what the model saw, token for token")
    add("--max_new_tokens", type=int, default=256, help="longest answer in tokens")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    add("--top_p", type=float, default=1.0, help="keep the likeliest tokens up to this mass")
    add("--top_k", type=int, default=0, help="keep so many of the likeliest tokens; 0 keeps all")
    add("--seed", type=int, default=0, help="of what is drawn")
    add("--batch_size", type=int, default=16, help="prompts at once")
    add("--json", action="store_true", help="print a JSON object per answer")
    add("--dtype", type=Literal["float32", "bfloat16", "float16"], default="float32")
    add("--device", type=str, default="auto", help="auto (the GPU when there is one) or a device")
    add("--revision", type=str | None, default=None, help="branch, tag or commit of a hub name")
    add("--trust_remote_code", action="store_true", help="run code that the model brings")
    return parser
