"""docs/extending.md: what it shows runs as it stands there."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from sdft import cli

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")


def blocks(language: str) -> str:
    return "\n\n".join(re.findall(rf"(?s)```{language}\n(.*?)```", PAGE))


@pytest.mark.usefixtures("no_plots")
def test_the_page_s_parts_make_a_run(
    tmp_path: Path,
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And the callback sees the row of the stage that has just ended."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)
    Path("my_parts.py").write_text(blocks("python"), encoding="utf-8")
    Path("my_run.yaml").write_text(blocks("yaml"), encoding="utf-8")
    small = ["--trainer.enable_progress_bar", "false", "--export.enabled", "false"]
    small += ["--trainer.accelerator", "cpu", "--model.model_name", str(model_dir)]
    assert cli.main(["fit", "--config", "my_run.yaml", *small]) == 0
    told = capsys.readouterr().out
    assert "stage 1 ended after 2 steps" in told
    assert "stage 2 ended after 4 steps" in told
    report = json.loads(next(Path().rglob("retention.json")).read_text())
    assert report["method"] == "capped-sdft"
    assert [cell["n"] for cell in report["matrix"][-1]] == [16, 4]
