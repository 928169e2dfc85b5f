"""What a checkpoint remembers of a run's settings, and how another run differs."""

from __future__ import annotations

from sdft.configuration import Configuration, Difference, difference_table

TREE = {
    "seed_everything": 3,
    "ckpt_path": "a.ckpt",
    "trainer": {"max_epochs": -1, "default_root_dir": "x", "logger": {"class_path": "L"}},
    "model": {
        "class_path": "sdft.SDFTModule",
        "init_args": {
            "temperature": 1.0,
            "max_new_tokens": 16,
            "hf_token": "hf_secret",
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        },
    },
    "data": {"init_args": {"tasks": [{"init_args": {"name": "a"}}], "mixtures": []}},
    "checkpoint": {"every_n_steps": 5},
}


def test_settings_have_the_names_that_flags_have() -> None:
    found = Configuration.of_command(TREE)
    assert found.whole
    assert found.values == {
        "seed_everything": 3,
        "trainer.max_epochs": -1,
        "model.class_path": "sdft.SDFTModule",
        "model.temperature": 1.0,
        "model.max_new_tokens": 16,
        "model.hf_token": "***",
        "model.optimizer.class_path": "torch.optim.AdamW",
        "model.optimizer.lr": 1e-3,
        "data.tasks.0.name": "a",
        "data.mixtures": "[]",
    }
    assert Configuration.from_dict(found.to_dict()) == found


def test_differences() -> None:
    before = Configuration({"a": 1, "b": 2, "gone": 3}, whole=True)
    now = Configuration({"a": 1, "b": 5, "new": None}, whole=True)
    assert now.differences(before) == [
        Difference("b", 2, 5),
        Difference("new", "–", None),
        Difference("gone", 3, "–"),
    ]
    assert now.differences(now) == []


def test_what_one_side_does_not_know_is_no_difference() -> None:
    """A run made in Python knows some of its settings."""
    before = Configuration({"a": 1, "b": 2})
    now = Configuration({"a": 7, "c": 3}, whole=True)
    assert now.differences(before) == [Difference("a", 1, 7)]
    assert before.differences(now) == [Difference("a", 7, 1)]


def test_the_table() -> None:
    many = [Difference("data.batch_size", 4, 8), Difference("model.optimizer.lr", 1e-3, 2.5e-4)]
    assert difference_table(many).splitlines() == [
        "  setting             checkpoint  now",
        "  data.batch_size     4           8",
        "  model.optimizer.lr  0.001       0.00025",
    ]
    assert difference_table(many, most=1).splitlines()[-1] == "  … and 1 more"
    assert "…" in difference_table([Difference("x", "y" * 50, "")])
