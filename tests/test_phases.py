"""The stopwatch: which phase runs, and what is put down to it."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from sdft.cost import Ledger
from sdft.memory import MemoryMeter, process_peak
from sdft.phases import PhaseClock


def test_a_phase_ends_where_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = PhaseClock()
    begun: list[str] = []
    clock.listener = begun.append
    for now, phase in (
        (10.0, "generate"),
        (12.5, "update"),
        (13.0, ""),
        (20.0, "update"),
        (21, ""),
    ):
        monkeypatch.setattr(time, "perf_counter", lambda now=now: now)
        clock.enter(phase)
    seconds = {name: cost.seconds for name, cost in clock.lap().phases.items()}
    assert seconds == {"generate": 2.5, "update": 1.5}
    assert begun == ["generate", "update", "", "update", ""]
    assert clock.lap().phases == {}


def test_what_is_counted_belongs_to_the_running_phase() -> None:
    clock = PhaseClock()
    clock.count(tokens=1000)  # between phases: nobody's
    clock.enter("score")
    clock.count(tokens=3, flops=30)
    clock.count(tokens=4, flops=40)
    clock.enter("")
    cost = clock.lap()["score"]
    assert (cost.tokens, cost.flops) == (7, 70)


def test_totals_outlive_laps() -> None:
    clock = PhaseClock()
    clock.totals = Ledger()
    for _ in range(2):
        clock.enter("score")
        clock.count(tokens=5, flops=50)
        clock.enter("")
        clock.lap()
    assert (clock.totals["score"].tokens, clock.totals["score"].flops) == (10, 100)
    assert clock.totals["score"].seconds > 0
    assert clock.totals["score"].peak_memory_bytes == 0, "nobody wanted to know"


def test_each_phase_has_its_own_memory() -> None:
    class Steps(MemoryMeter):
        begun = 0

        def begin(self) -> None:
            self.begun += 1

        def end(self) -> int:
            return 100 * self.begun

    clock = PhaseClock()
    clock.totals, clock.memory = Ledger(), Steps(torch.device("cpu"))
    for phase in ("generate", "update", "", "generate", ""):
        clock.enter(phase)
    found = {name: cost.peak_memory_bytes for name, cost in clock.totals.phases.items()}
    assert found == {"generate": 300, "update": 200}


def test_the_resident_set_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = MemoryMeter(torch.device("cpu"))
    assert meter.kind == "resident_at_phase_end"
    before = meter.end()
    kept = torch.ones(2**24)  # 64 MiB, every page of it touched
    grown = meter.end() - before
    assert 0.9 * 2**26 < grown < 1.5 * 2**26
    del kept
    assert process_peak() > 2**26
    monkeypatch.setattr("sdft.memory._STATM", type("Missing", (), {"exists": lambda self: False})())
    other = MemoryMeter(torch.device("cpu"))
    assert other.kind == "resident_peak_so_far"
    assert other.end() == process_peak()


def test_a_phase_on_a_gpu_is_measured_from_its_own_start(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = [0]
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda device: peak.__setitem__(0, 5)
    )
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
    clock = PhaseClock()
    clock.totals, clock.memory = Ledger(), MemoryMeter(torch.device("cuda"))
    clock.enter("generate")
    peak[0] = 100
    clock.enter("update")
    peak[0] = 30
    clock.enter("")
    assert clock.totals["generate"].peak_memory_bytes == 100
    assert clock.totals["update"].peak_memory_bytes == 30


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_peak_of_each_phase_on_a_gpu() -> None:
    device = torch.device("cuda")
    clock = PhaseClock()
    clock.totals, clock.memory = Ledger(), MemoryMeter(device)
    assert clock.memory.kind == "cuda_peak_allocated"
    clock.enter("generate")
    large = torch.ones(2**26, device=device)
    del large  # freed before the phase ends
    clock.enter("update")
    small = torch.ones(2**20, device=device)
    clock.enter("")
    assert clock.totals["generate"].peak_memory_bytes >= 2**28
    assert 2**22 <= clock.totals["update"].peak_memory_bytes < 2**28
    del small


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a trap of Linux")
def test_the_peak_of_a_process_is_not_its_parents() -> None:
    held = bytearray(b"x") * (1 << 30)
    peak = "from sdft.memory import process_peak; print(process_peak())"
    found = subprocess.run([sys.executable, "-c", peak], capture_output=True, text=True, check=True)
    assert int(found.stdout) < len(held)
