"""A run of one process: nothing is said to anybody. Several: tests/distributed/."""

from __future__ import annotations

import torch

from sdft.ranks import agreed, gathered, means, part_of_mean, rank, ranks, summed


def test_one_process_is_all_there_are() -> None:
    assert (rank(), ranks()) == (0, 1)
    assert gathered("x") == ["x"]
    assert agreed("x") == "x"
    assert summed(torch.tensor(2.0)) == 2.0
    loss = torch.tensor(2.0, requires_grad=True)
    assert part_of_mean(loss, 3) is loss
    values = {"a": 1.5, "b": torch.tensor(2.0)}
    assert means(values, 0, torch.empty(0)) == values
