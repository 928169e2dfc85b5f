"""What the processes of a sharded run send one another in a step, reckoned and counted.

A sharded model (`sdft.sharding`) has one group of weights per decoder layer and one of all others
(embedding, last norm, head): its root. Each group is gathered by one collective call and its
gradient scattered by one. How often, phase by phase:

* rollout: every group once, and the root once more to begin with; whole until the rollout's end;
* teacher: every group once, and the head once more, for the loss holds it whole;
* student: every group once in the forward and once in the backward pass, and scattered once;
* clipping: the norms of all parameters, in one call;
* optimizer and teacher's average: nothing, they work on shards.

`tools/count_collectives.py` counts the same in real processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sdft.shapes import ModelShape

Kind = Literal["all-gather", "reduce-scatter", "all-reduce"]
CommunicationPhase = Literal["rollout", "teacher", "student", "clipping"]
_REDUCED = 4  # bytes: gradients are summed in fp32


@dataclass(frozen=True)
class Collective:
    """Collective calls of one kind in one phase of an optimizer step.

    Attributes:
        phase: When.
        kind: Which.
        calls: How many.
        size: Bytes of the whole tensors, of all calls together: what a gather makes, what a
            scatter or a reduction takes.
        formula: Of the calls and of the size.
        exposed_calls: Of `calls`, those that no arithmetic can hide.
        exposed_size: Of `size`, theirs.
    """

    phase: CommunicationPhase
    kind: Kind
    calls: int
    size: float
    formula: str
    exposed_calls: int
    exposed_size: float


@dataclass(frozen=True)
class Network:
    """How processes are connected: assumptions, to be replaced by what is measured.

    Attributes:
        gpus_per_node: GPUs of one machine.
        within: Bytes per second that a GPU receives from the others of its machine.
        between: Bytes per second that a GPU receives from other machines.
        reached: Share of either that collective calls reach.
        latency: Seconds that each of the G − 1 rounds of a call takes, however little it sends.
    """

    gpus_per_node: int = 8
    within: float = 450e9
    between: float = 50e9
    reached: float = 0.8
    latency: float = 5e-6

    def __post_init__(self) -> None:
        if self.gpus_per_node < 1:
            raise ValueError(f"gpus_per_node must be at least 1, found {self.gpus_per_node}")
        for name in ("within", "between"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")
        if not 0 < self.reached <= 1:
            raise ValueError(f"reached must be in (0, 1], found {self.reached}")
        if not self.latency >= 0:
            raise ValueError(f"latency must be 0 or more, found {self.latency}")

    def bandwidth(self, gpus: int) -> float:
        """Bytes per second and GPU: every ring passes through the slower of two links.

        Between machines run as many rings as a machine has GPUs, each over a link of its own, so
        that a byte enters a machine once and is handed on inside.
        """
        if gpus <= self.gpus_per_node:
            return self.reached * self.within
        return self.reached * min(self.within, self.gpus_per_node * self.between)

    def seconds(self, kind: Kind, calls: float, size: float, gpus: int) -> float:
        """Of ring collectives: (G − 1)/G · size / bandwidth + calls · (G − 1) · latency.

        A reduction is a scatter and a gather: twice that.

        Args:
            kind: Of call.
            calls: How many.
            size: Bytes, of all calls together.
            gpus: G.
        """
        if gpus == 1:
            return 0.0
        rounds = 2 if kind == "all-reduce" else 1
        sent = (gpus - 1) / gpus * size / self.bandwidth(gpus)
        return rounds * (sent + calls * (gpus - 1) * self.latency)


def collectives(
    shape: ModelShape,
    passes: int = 1,
    weight_bytes: int = 2,
    clipped: bool = True,
) -> list[Collective]:
    """The collective calls of one optimizer step with sharded weights, whatever the processes.

    Args:
        shape: Of student and teacher.
        passes: Forward and backward passes over which the batch is divided.
        weight_bytes: Of a gathered weight: 2 under bf16-mixed, 4 in fp32.
        clipped: Whether the gradient's norm is clipped.
    """
    groups, size = shape.layers + 1, shape.parameters
    root, head = shape.root_parameters, shape.vocab * shape.hidden
    everything = weight_bytes * (size + root)
    found = [
        Collective(
            "rollout",
            "all-gather",
            groups + 1,
            everything,
            f"L + 2 calls, {weight_bytes} B × (P + R)",
            groups + 1,
            everything,
        ),
        Collective(
            "teacher",
            "all-gather",
            passes * (groups + 1),
            passes * weight_bytes * (size + head),
            f"m·(L + 2) calls, {weight_bytes} B × m·(P + V·D)",
            2 * passes,
            passes * weight_bytes * (root + head),
        ),
        Collective(
            "student",
            "all-gather",
            2 * passes * groups,
            2 * passes * weight_bytes * size,
            f"2m·(L + 1) calls, {weight_bytes} B × 2m·P",
            2 * passes,
            2 * passes * weight_bytes * root,
        ),
        Collective(
            "student",
            "reduce-scatter",
            passes * groups,
            passes * _REDUCED * size,
            f"m·(L + 1) calls, {_REDUCED} B × m·P",
            passes,
            passes * _REDUCED * root,
        ),
    ]
    if clipped:
        norms = _REDUCED * shape.tensors
        found.append(
            Collective("clipping", "all-reduce", 1, norms, "1 call, 4 B × tensors", 1, norms)
        )
    return found
