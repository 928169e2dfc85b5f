"""One process's share of a batch whose rows all processes have dealt among themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdft.batch import Origin


@dataclass(frozen=True)
class Share:
    """Where the rows of a share stand in the whole batch.

    Attributes:
        places: Of each row.
        real: Whether each row counts. One that does not stands in where the process got no row of
            an origin, so that all processes make the same passes through the models.
        origins: Of all rows of the whole batch.
    """

    places: tuple[int, ...]
    real: tuple[bool, ...]
    origins: tuple[Origin, ...]

    @property
    def total(self) -> int:
        """Rows of the whole batch."""
        return len(self.origins)

    def rows(self, rows: Sequence[int]) -> Share:
        """The share of these rows."""
        chosen = tuple(self.places[row] for row in rows), tuple(self.real[row] for row in rows)
        return Share(*chosen, self.origins)

    def repeat(self, times: int) -> Share:
        """The share when every row of the whole batch stands there `times` times."""
        return Share(
            tuple(place * times + copy for place in self.places for copy in range(times)),
            tuple(real for real in self.real for _ in range(times)),
            tuple(origin for origin in self.origins for _ in range(times)),
        )

    def of(self, origins: Sequence[Origin]) -> Share:
        """The share when the whole batch is its rows of these origins."""
        kept = [place for place, origin in enumerate(self.origins) if origin in origins]
        now = {place: new for new, place in enumerate(kept)}
        held = [row for row, place in enumerate(self.places) if place in now]
        places = tuple(now[self.places[row]] for row in held)
        return replace(self.rows(held), places=places, origins=tuple(origins_of(self, kept)))

    @staticmethod
    def joined(shares: Sequence[Share]) -> Share:
        """The share of several batches laid end to end."""
        places: list[int] = []
        before = 0
        for share in shares:
            places += [before + place for place in share.places]
            before += share.total
        real = tuple(real for share in shares for real in share.real)
        return Share(tuple(places), real, tuple(o for share in shares for o in share.origins))


def origins_of(share: Share, places: Sequence[int]) -> list[Origin]:
    """The origins of some rows of the whole batch."""
    return [share.origins[place] for place in places]


def deal(origins: Sequence[Origin], rank: int, ranks: int) -> Share:
    """What a process gets of a batch: of each origin every `ranks`-th row, in their order.

    A process that gets no row of an origin takes the origin's first one without counting it.

    Args:
        origins: Of all rows, at least one.
        rank: Which process.
        ranks: How many there are.
    """
    held: dict[int, bool] = {}
    for origin in dict.fromkeys(origins):
        places = [place for place, found in enumerate(origins) if found == origin]
        own = places[rank::ranks]
        held |= dict.fromkeys(own, True) if own else {places[0]: False}
    order = sorted(held)
    return Share(tuple(order), tuple(held[place] for place in order), tuple(origins))
