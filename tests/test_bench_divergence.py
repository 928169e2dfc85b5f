"""The benchmark of the divergence: both variants run, each in its process, and chunks are small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "bench_divergence.py"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_it_measures_time_and_memory_of_both_variants(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    options = ["--rows", "1024", "--vocab", "16000", "--hidden", "32", "--repeats", "1"]
    result = subprocess.run(
        [sys.executable, str(TOOL), *options, "--json", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads(out.read_text(encoding="utf-8"))
    assert figures["rows"] == 1024
    assert all(f"{figures[name]['ms']:.0f} ms" in result.stdout for name in ("naive", "chunked"))
    whole = 1024 * 16000 * 4 / 2**20  # one tensor of all tokens and the whole vocabulary, in MiB
    assert figures["naive"]["extra_mib"] > 3 * whole
    assert figures["chunked"]["extra_mib"] < 1.5 * whole
