"""One of several processes that run cases: `worker.py FOLDER STRATEGY RANKS CASE…`."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from cases import CASES, run


def main(root: str, strategy: str, ranks: str, *names: str) -> int:
    for name in names:
        family = CASES[name].get("family", "llama")
        folder = Path(root) / name
        folder.mkdir(parents=True, exist_ok=True)
        try:
            run(CASES[name], Path(root) / f"model-{family}", folder, strategy, int(ranks))
        except Exception:
            (folder / "error.txt").write_text(traceback.format_exc())
            raise
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
