"""From what the model wrote to training examples: read, checked, freed of duplicates."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdft.checks import AnyCheck, Facts, reason_to_drop, shown_reasons
from sdft.examples import Example, as_messages
from sdft.self_edits.duplicates import Duplicates, ngrams_of, similarity
from sdft.self_edits.kinds import Kind
from sdft.self_edits.outputs import Output
from sdft.self_edits.parsing import Item
from sdft.self_edits.passages import Passage

Record = dict[str, Any]


@dataclass
class Selection:
    """What became of the outputs.

    Attributes:
        kept: Edits as `JSONLTask` reads them.
        rejected: The others, each with its reason.
    """

    kept: list[Record] = field(default_factory=list)
    rejected: list[Record] = field(default_factory=list)

    def summary(self) -> dict[str, dict[str, Any]]:
        """Per kind: how many are kept, and how many each reason has rejected."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for record in self.rejected:
            counts[record["kind"]][record["reason"]] += 1
        kept = Counter(record["kind"] for record in self.kept)
        return {
            kind: {"kept": kept[kind], "rejected": dict(counts[kind].most_common())}
            for kind in sorted({*kept, *counts})
        }


class Selector:
    """Makes edits of outputs, in their order: of two duplicates the first one stays.

    Args:
        kinds: The kinds that were asked for.
        checks: Which edits are kept.
        count_tokens: Tokens of a text.
        ngram: Words of an n-gram, for near-duplicates.
        threshold: Similarity of n-grams from which two edits of a kind are near-duplicates.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(
        self,
        kinds: Sequence[Kind],
        checks: Sequence[AnyCheck],
        count_tokens: Callable[[str], int],
        ngram: int,
        threshold: float,
    ) -> None:
        self.kinds = {kind.name: kind for kind in kinds}
        self.checks = checks
        self.count_tokens = count_tokens
        self.seen = {kind.name: Duplicates(ngram, threshold) for kind in kinds}

    def select(self, passages: Sequence[Passage], outputs: Sequence[Sequence[Output]]) -> Selection:
        """Edits and rejects of all passages.

        Raises:
            ValueError: A check raised.
        """
        selection = Selection()
        for passage, found in zip(passages, outputs, strict=True):
            for output in found:
                for record, reason in self._judged(passage, output):
                    if reason is None:
                        selection.kept.append(record)
                    else:
                        selection.rejected.append({"reason": reason, **record})
        return selection

    def _judged(self, passage: Passage, output: Output) -> Iterator[tuple[Record, str | None]]:
        kind = self.kinds[output.kind]
        items = [] if output.problem else kind.parse(output.text)
        if not items:
            about = {"kind": kind.name, "passage": passage.number, "output": output.text}
            yield about, output.problem or "no item could be read"
        for place, item in enumerate(items):
            cut = output.truncated and place == len(items) - 1
            record = _record(kind, passage, item)
            reason = self._reason(kind, passage, record, cut)
            if reason is None:
                self.seen[kind.name].add(_compared(kind, record))
            yield record, reason

    def _reason(self, kind: Kind, passage: Passage, record: Record, cut: bool) -> str | None:
        prompt, answer = record["prompt"], record["answer"]
        if not prompt.strip():
            return "an answer without a question"
        if not answer.strip():
            return "truncated" if cut else "a question without an answer"
        example = Example(as_messages(prompt), answer, answer, passage.text)
        facts = Facts(self.count_tokens(answer), cut)
        return (
            reason_to_drop(self.checks, answer, example, facts)
            or self._copies(kind, passage, answer)
            or self.seen[kind.name].reason(_compared(kind, record))
        )

    def _copies(self, kind: Kind, passage: Passage, answer: str) -> str | None:
        seen = self.seen[kind.name]
        texts = (ngrams_of(text, seen.ngram) for text in (answer, passage.text))
        return "copies the passage" if similarity(*texts) >= seen.threshold else None


def _record(kind: Kind, passage: Passage, item: Item) -> Record:
    prompt = kind.training_prompt(passage) if item.prompt is None else item.prompt
    return {
        "prompt": prompt,
        "answer": item.answer,
        "demonstration": item.answer,
        "context": passage.text,
        "kind": kind.name,
        "passage": passage.number,
    }


def _compared(kind: Kind, record: Record) -> str:
    """What of an edit is compared: prompts that we wrote are alike for a whole passage."""
    own_prompt = record["prompt"] if kind.prompt is None else ""
    return f"{own_prompt}\n{record['answer']}"


def shown_summary(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """One line: `implications 12 kept, 3 rejected (2 near-duplicate, 1 truncated); …`."""
    parts = []
    for kind, counts in summary.items():
        rejected = counts["rejected"]
        why = f" ({shown_reasons(dict(rejected))})" if rejected else ""
        parts.append(f"{kind} {counts['kept']} kept, {sum(rejected.values())} rejected{why}")
    return "; ".join(parts)
