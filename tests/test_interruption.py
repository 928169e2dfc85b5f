"""Signals are noted, not obeyed; whose they were, they are again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose

from sdft.interruption import SIGNALS, Interrupted, Interruption, farewell


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    held = Interruption()
    held.begin(forward=lambda number: None)
    os.kill(os.getpid(), number)
    assert held.asked == number
    told = capfd.readouterr().err
    assert told.startswith(f"sdft: {signal.Signals(number).name}: ")
    held.end()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_of_the_user_s_own_and_ignored_signals_stay() -> None:
    def own(number: int, frame: FrameType | None) -> None:
        pass

    signal.signal(signal.SIGUSR1, own)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background job
    held = Interruption()
    held.begin(forward=lambda number: None)
    assert signal.getsignal(signal.SIGUSR1) is own
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    os.kill(os.getpid(), signal.SIGUSR2)
    assert held.asked is None


def test_somebody_who_took_a_signal_over_keeps_it() -> None:
    held = Interruption()
    held.begin(forward=lambda number: None)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    held.end()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_a_thread_leaves_signals_alone() -> None:
    held = Interruption()
    thread = threading.Thread(target=held.begin, args=(lambda number: None,))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    held.end()


def test_lightning_s_handlers_wait_for_the_end_of_the_step() -> None:
    """Its SLURM handler saves wherever it is called, and puts the job back into the queue."""
    called: list[int] = []

    def requeue(number: int, frame: FrameType | None) -> None:
        called.append(number)

    requeue.__module__ = "lightning.pytorch.trainer.connectors.signal_connector"
    signal.signal(signal.SIGUSR1, _HandlersCompose([requeue]))
    held = Interruption()
    held.begin(forward=lambda number: None)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert (held.asked, called) == (signal.SIGUSR1, [])
    held.pass_on(signal.SIGUSR1)
    assert called == [signal.SIGUSR1]
    held.end()
    assert isinstance(signal.getsignal(signal.SIGUSR1), _HandlersCompose)


def test_a_user_s_handler_that_lightning_calls_is_called() -> None:
    called: list[int] = []

    def own(number: int, frame: FrameType | None) -> None:
        called.append(number)

    signal.signal(signal.SIGTERM, own)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False)
    trainer._signal_connector.register_signal_handlers()
    held = Interruption()
    held.begin(forward=lambda number: None)
    os.kill(os.getpid(), signal.SIGTERM)
    assert (held.asked, called) == (signal.SIGTERM, [signal.SIGTERM])
    assert not trainer.received_sigterm, "or Lightning would end the run before it is saved"
    held.end()
    trainer._signal_connector.teardown()
    assert signal.getsignal(signal.SIGTERM) is own


@pytest.mark.parametrize("given", [["--ckpt_path", "old run"], ["--ckpt_path=old"], []])
def test_the_farewell_names_the_command(given: list[str]) -> None:
    ended = Interrupted(signal.SIGUSR1, 7, Path("my runs/step-7.ckpt"))
    assert ended.code == 138
    words = ["fit", "-c", "a.yaml", *given, "--data.steps", "9"]
    assert farewell(ended, words) == (
        "ended by SIGUSR1 after step 7, which is saved; go on with\n"
        "  python -m sdft fit -c a.yaml --data.steps 9 --ckpt_path 'my runs/step-7.ckpt'"
    )
    assert farewell(Interrupted(15, 0, None), words) == (
        "ended by SIGTERM before anything was trained: start it again"
    )


@pytest.mark.parametrize(
    "key", [["--model.engine.api_key", "hush"], ["--model.engine.api_key=hush"]]
)
def test_the_farewell_names_no_secret(key: list[str]) -> None:
    told = farewell(Interrupted(15, 7, Path("step-7.ckpt")), ["fit", *key, "--data.steps=9"])
    assert "hush" not in told
    assert "***" in told
    assert told.endswith("--data.steps=9 --ckpt_path step-7.ckpt")
