"""The command that builds a data set from documents.

python -m sdft knowledge build --docs my_documents --out data/knowledge
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from jsonargparse import Namespace

from sdft.knowledge import table
from sdft.knowledge.build import KnowledgeBuild
from sdft.knowledge.dataset import DataSet
from sdft.self_edits.command import Parser

_EVERY_S = 5.0


def main(args: list[str]) -> int:
    """Run `knowledge build` or `knowledge table`; returns the exit status.

    Raises:
        ValueError: See `KnowledgeBuild` and `table`.
    """
    commands = {"build": build, "table": table.main}
    if args and args[0] in commands:
        return commands[args[0]](args[1:])
    if args[:1] in (["-h"], ["--help"]):
        print("python -m sdft knowledge build|table --help")
        return 0
    raise ValueError(f"knowledge: say build or table, found {args[0] if args else 'nothing'!r}")


def build(args: list[str]) -> int:
    """Build a data set; returns the exit status.

    Raises:
        ValueError: See `KnowledgeBuild`.
    """
    parser = Parser(prog="python -m sdft knowledge build", description=__doc__.splitlines()[0])
    parser.add_argument("-c", "--config", action="config", help="YAML file, may be repeated")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that is there")
    parser.add_class_arguments(KnowledgeBuild)
    parsed = parser.parse_args(args)
    # Its name before jsonargparse 4.49 was another.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    settings: Namespace = instantiate(parsed)
    overwrite = settings.pop("overwrite")
    settings.pop("config")
    own = KnowledgeBuild(**vars(settings))
    try:
        data = own.write(overwrite, _progress())
    except KeyboardInterrupt:
        print("knowledge: stopped; the same command goes on", file=sys.stderr)
        return 130
    print(_summary(own, data))
    return 0


def _summary(build: KnowledgeBuild, data: DataSet | None) -> str:
    if data is None:
        return f"knowledge: {build.folder} is there already (--overwrite builds it anew)"
    counts = data.counts()
    parts = ", ".join(f"{counts[name]} {name}" for name in data.questions)
    why = "; ".join(f"{count} {reason}" for reason, count in data.reasons().items())
    lines = [
        f"knowledge: {counts['documents']} documents, {counts['passages']} passages: {parts}",
        f"left out: {counts['rejected']}" + (f" ({why})" if why else ""),
        f"now review {build.folder / 'README.md'}",
    ]
    return "\n".join(lines)


def _progress() -> Callable[[str, int, int], None]:
    """A line every few seconds, and one at the end of each kind of request."""
    last = 0.0

    def tell(what: str, done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > _EVERY_S:
            last = time.monotonic()
            print(f"knowledge: {what}: {done} of {total}", flush=True)

    return tell
