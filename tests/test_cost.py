"""The ledger of what phases cost."""

from __future__ import annotations

import json

import pytest

from sdft.cost import PHASES, TRAINING, Ledger, PhaseCost


def ledger() -> Ledger:
    made = Ledger()
    made.add("generate", PhaseCost(2.0, 100, 1000, 50))
    made.add("update", PhaseCost(1.0, 30, 900, 70))
    made.add("generate", PhaseCost(3.0, 400, 4000, 40))
    made.add("evaluate", PhaseCost(10.0, 7, 70, 20))
    made.add("own", PhaseCost(0.5))
    return made


def test_occurrences_add_up_and_memory_is_the_largest() -> None:
    assert ledger()["generate"] == PhaseCost(5.0, 500, 5000, 50)
    assert ledger()["score"] == PhaseCost()


def test_the_content_of_the_report() -> None:
    values = ledger().to_dict()
    assert list(values["phases"]) == [*PHASES, "own"]
    assert values["phases"]["generate"] == {
        "seconds": 5.0,
        "tokens": 500,
        "tokens_per_second": 100.0,
        "flops": 5000,
        "peak_memory_bytes": 50,
    }
    assert values["phases"]["score"] == {
        "seconds": 0.0,
        "tokens": 0,
        "tokens_per_second": None,
        "flops": 0,
        "peak_memory_bytes": None,
    }
    assert values["training"] == {"seconds": 6.0, "tokens": 530, "flops": 5900}
    assert values["total"] == {"seconds": 16.5, "flops": 5970}
    assert not {"evaluate", "track"} & set(TRAINING)


def test_a_ledger_goes_on_from_a_state() -> None:
    first, second = ledger(), ledger()
    state = json.loads(json.dumps(first.state_dict()))
    second.load_state_dict(state)
    assert second["generate"] == PhaseCost(10.0, 1000, 10000, 50)
    assert first["generate"] == PhaseCost(5.0, 500, 5000, 50)
    fresh = Ledger()
    fresh.load_state_dict(state)
    assert fresh.to_dict() == first.to_dict()


def test_scalars_have_a_speed_where_there_were_tokens() -> None:
    assert ledger().scalars() == {
        "seconds/generate": 5.0,
        "seconds/update": 1.0,
        "seconds/evaluate": 10.0,
        "seconds/own": 0.5,
        "tokens_per_second/generate": 100.0,
        "tokens_per_second/update": 30.0,
        "tokens_per_second/evaluate": pytest.approx(0.7),
    }


def test_processes_side_by_side_are_joined() -> None:
    first, second = Ledger(), Ledger()
    first.add("update", PhaseCost(2.0, 10, 100, 7))
    first.add("score", PhaseCost(1.0, 3, 30, 1))
    second.add("update", PhaseCost(3.0, 5, 50, 4))
    joined = Ledger.joined([first, second])
    assert joined["update"] == PhaseCost(3.0, 15, 150, 7)
    assert joined["score"] == PhaseCost(1.0, 3, 30, 1)
    assert Ledger.joined([first]).state_dict() == first.state_dict()
