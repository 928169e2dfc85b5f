"""One of several processes that make the same runs: `worker.py JOBS.json`, a list of jobs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import probes  # noqa: E402 - its folder's parent has to be found first
from cases import evaluate, run  # noqa: E402
from conftest import save_model  # noqa: E402

from sdft.interruption import Interrupted  # noqa: E402
from sdft.ranks import part_ways, rank  # noqa: E402


def work(kind: str, folder: Path, **options: Any) -> None:
    """Do one job."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "save":
        for family in options["families"]:
            save_model(folder / family, family=family)
    elif kind == "probe":
        getattr(probes, options["name"])(folder)
    elif kind == "run":
        try:
            run(models=Path(options.pop("models")), folder=folder, **options)
        except Interrupted as ended:
            told = {"code": ended.code, "step": ended.step, "checkpoint": str(ended.checkpoint)}
            (folder / f"interrupted-{rank()}.json").write_text(json.dumps(told))
    else:
        found = evaluate(models=Path(options.pop("models")), folder=folder, **options)
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        work(folder=Path(job.pop("folder")), **job)
    part_ways()
