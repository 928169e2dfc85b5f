"""The command that writes self-edits.

python -m sdft self_edits --config configs/self_edits.yaml
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NoReturn

from jsonargparse import ArgumentParser, Namespace

from sdft.atomic import atomic_write
from sdft.checks import AnyCheck, LengthCheck
from sdft.messages import clear_message
from sdft.models import ModelSource
from sdft.rollout import Sampling
from sdft.self_edits.author import Author
from sdft.self_edits.edits import Selection, Selector, shown_summary
from sdft.self_edits.kinds import chosen_kinds
from sdft.self_edits.outputs import Asking, OutputFile, write_outputs
from sdft.self_edits.passages import Passage, read_passages
from sdft.stores import describe, fingerprint
from sdft.weights import weights_digest

EDITS, REJECTED, OUTPUTS, SUMMARY = (
    "edits.jsonl",
    "rejected.jsonl",
    "outputs.jsonl",
    "summary.json",
)


class SelfEdits:
    """Has a model write training examples from passages, or from the description of a task.

    The folder `out` gets `edits.jsonl` (what `JSONLTask` reads: prompt, answer, demonstration,
    context, and kind and passage beside them), `rejected.jsonl` (the others, with reasons),
    `outputs.jsonl` (what the model wrote, word for word) and `summary.json`. A killed run continues
    after the last passage that it finished.

    Args:
        model_name: A model folder (a run's exported `model/`, too), a `.gguf` file, a hub name, or
            `sdft:smollm2`.
        out: Folder of the files; made when missing.
        passages: JSONL file with the passages, one object per line.
        description: Description of a task, in place of passages.
        text_field: Field with a passage's text.
        title_field: Field with its title, which a line may lack.
        limit: Use at most the first so many passages.
        kinds: What is written: `implications`, `questions`, `rewrites`, and `examples` of a
            described task. The first three for passages and the last for a description when unset.
        templates: Per kind, what the model is asked, with `{passage}` and `{count}`.
        prompts: For `implications` and `rewrites` the prompt of the training example, with
            `{title}`: the passage's title, or its first words.
        per_passage: Items of each kind that are asked for per passage.
        temperature: Divides the logits when the model writes; 0 is greedy.
        top_p: Keep the smallest set of tokens with this probability.
        seed: Of the random numbers.
        max_new_tokens: Longest output, in tokens.
        batch_size: Requests at once.
        checks: Which edits are kept (`sdft.checks`, or one's own), by their answers;
            `LengthCheck()` when unset, which drops what the length limit cut.
        duplicate_ngram: Words of an n-gram, for near-duplicates.
        duplicate_threshold: Share of n-grams in common (Jaccard) from which two edits of a kind
            are near-duplicates, in (0, 1].
        dtype: Precision of the weights.
        device: `auto` (the GPU when there is one) or a torch device.
        chat_template_kwargs: Passed to the chat template.
        trust_remote_code: Run code that the model repository brings.
        revision: Branch, tag or commit of a hub name.

    Raises:
        ValueError: A setting out of range, passages that cannot be read, or both or neither of
            passages and description.
    """

    def __init__(
        self,
        model_name: str,
        out: str,
        passages: str | None = None,
        description: str | None = None,
        text_field: str = "text",
        title_field: str = "title",
        limit: int | None = None,
        kinds: list[str] | None = None,
        templates: dict[str, str] | None = None,
        prompts: dict[str, str] | None = None,
        per_passage: int = 5,
        temperature: float = 0.7,
        top_p: float = 0.95,
        seed: int = 0,
        max_new_tokens: int = 512,
        batch_size: int = 16,
        checks: list[AnyCheck] | None = None,
        duplicate_ngram: int = 3,
        duplicate_threshold: float = 0.7,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        device: str = "auto",
        chat_template_kwargs: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        for name, value in (("per_passage", per_passage), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        self.folder = Path(out)
        self.passages = _read(passages, description, text_field, title_field, limit)
        default = ["examples"] if passages is None else ["implications", "questions", "rewrites"]
        chosen = chosen_kinds(kinds or default, templates or {}, prompts or {})
        self.asking = Asking(chosen, per_passage, batch_size, seed)
        sampling = Sampling(max_new_tokens, temperature, top_p)
        source = ModelSource(model_name, trust_remote_code, revision)
        self.author = Author(source, sampling, dtype, device, chat_template_kwargs)
        self.checks = [LengthCheck()] if checks is None else list(checks)
        self.selector = Selector(
            chosen, self.checks, self.author.count_tokens, duplicate_ngram, duplicate_threshold
        )

    def write(self, overwrite: bool = False) -> Selection | None:
        """Write the files; None where they are there already.

        Args:
            overwrite: Write them anew. What the model wrote is kept where model, passages,
                requests and sampling are the same.

        Raises:
            ValueError: Files of another configuration, a check that raised, or not one edit left.
        """
        mark = fingerprint(self._settings())
        if not overwrite and self._finished(mark):
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        outputs = self._outputs(overwrite)
        selection = self.selector.select(self.passages, outputs)
        for name in (SUMMARY, EDITS):
            (self.folder / name).unlink(missing_ok=True)
        _write_lines(self.folder / REJECTED, selection.rejected)
        if not selection.kept:
            raise ValueError(
                f"not one self-edit is left: {shown_summary(selection.summary())}; see "
                f"{self.folder / REJECTED}"
            )
        _write_lines(self.folder / EDITS, selection.kept)
        summary = {"fingerprint": mark, "kinds": selection.summary()}
        with atomic_write(self.folder / SUMMARY) as temporary:
            temporary.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        return selection

    def _finished(self, mark: str) -> bool:
        """Whether the edits are there; the summary is the last file that a run writes."""
        path = self.folder / SUMMARY
        if not path.is_file():
            return False
        if json.loads(path.read_text(encoding="utf-8")).get("fingerprint") != mark:
            raise ValueError(
                f"{self.folder} holds the self-edits of another configuration or other passages: "
                "give another folder as out, or --overwrite"
            )
        return True

    def _outputs(self, overwrite: bool) -> Any:
        digest = weights_digest(self.author.model)
        file = OutputFile(self.folder / OUTPUTS, {"weights": digest, **self._asked()})
        return write_outputs(
            self.author, self.passages, self.asking, file, overwrite, self._progress()
        )

    def _progress(self) -> Callable[[int], None]:
        return lambda done: print(f"self-edits: passage {done + 1} of {len(self.passages)} …")

    def _asked(self) -> dict[str, Any]:
        """What the outputs depend on, beside the weights."""
        return {
            "model": self.author.source.name,
            "passages": fingerprint({"passages": [asdict(p) for p in self.passages]}),
            "kinds": [[k.name, k.template, k.single] for k in self.asking.kinds],
            "count": self.asking.count,
            "batch_size": self.asking.batch_size,
            "seed": self.asking.seed,
            "sampling": asdict(self.author.sampling),
            "dtype": self.author.dtype_name,
            "chat_template": self.author.chat_template_kwargs,
        }

    def _settings(self) -> dict[str, Any]:
        """What the edits depend on, beside the weights."""
        (seen, *_) = self.selector.seen.values()
        return {
            **self._asked(),
            "prompts": [kind.prompt for kind in self.asking.kinds],
            "checks": describe(self.checks),
            "duplicates": [seen.ngram, seen.threshold],
        }


def _read(
    passages: str | None,
    description: str | None,
    text_field: str,
    title_field: str,
    limit: int | None,
) -> list[Passage]:
    if (passages is None) == (description is None):
        found = "neither" if passages is None else "both"
        raise ValueError(f"give passages or a description, found {found}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, found {limit}")
    if passages is not None:
        return read_passages(passages, text_field, title_field, limit)
    if not (description or "").strip():
        raise ValueError("the description is empty")
    return [Passage(1, str(description).strip())]


def _write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    with atomic_write(path) as temporary:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        temporary.write_text("".join(lines), encoding="utf-8")


# ---------------------------------------------------------------- the command line


class Parser(ArgumentParser):
    """A parser whose errors are one clear line, without the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the line and exit with status 2."""
        if not self.exit_on_error:  # a parser within the parser: the outermost one speaks
            super().error(message, ex)
        print(f"sdft: error: {clear_message(message)}", file=sys.stderr)
        raise SystemExit(2)


def main(args: list[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        ValueError: See `SelfEdits`.
    """
    parser = Parser(prog="python -m sdft self_edits", description=__doc__.splitlines()[0])
    parser.add_argument("-c", "--config", action="config", help="YAML file, may be repeated")
    parser.add_argument("--overwrite", action="store_true", help="write the edits anew")
    parser.add_class_arguments(SelfEdits)
    parsed = parser.parse_args(args)
    # Its name before jsonargparse 4.49 was another.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    settings: Namespace = instantiate(parsed)
    overwrite = settings.pop("overwrite")
    settings.pop("config")
    edits = SelfEdits(**vars(settings))
    try:
        selection = edits.write(overwrite)
    except KeyboardInterrupt:
        print("self-edits: stopped; the same command goes on", file=sys.stderr)
        return 130
    if selection is None:
        print(f"self-edits: {edits.folder / EDITS} is there already (--overwrite writes it anew)")
        return 0
    print(f"self-edits: {shown_summary(selection.summary())}: {edits.folder / EDITS}")
    return 0
