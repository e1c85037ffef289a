"""Where a walk over the dirty bitmap ended, in pages that come over several connections.

QEMU walks over RAM in order and hands pages to whichever connection is free. Each connection sees
ascending addresses; a step back on one of them, or from one interval between two syncs to the
next, is where the walk began anew. Two such steps within one interval count once: as everywhere,
what is found is the least number of rounds.
"""

from collections.abc import Iterable

Place = tuple[int, int]
"""RAM block and page."""


class Track:
    """Where the pages of one connection went since the last sync.

    Attributes:
        lowest: Of them all; None without pages.
        last: The one that came last.
        stepped_back: Whether a page did not lie behind the one before it.
    """

    def __init__(self) -> None:
        self.lowest: Place | None = None
        self.last: Place | None = None
        self.stepped_back = False

    def note(self, block: int, first: int, last: int) -> None:
        """Take in ascending pages of one block."""
        place = block, first
        if self.last is None or self.lowest is None:
            self.lowest = place
        elif place <= self.last:
            self.stepped_back = True
            self.lowest = min(self.lowest, place)
        self.last = block, last


class RoundFinder:
    """Compares intervals."""

    def __init__(self) -> None:
        self._reached: Place | None = None

    def wrapped(self, tracks: Iterable[Track]) -> bool:
        """Say whether the walk began anew in the interval that these tracks show."""
        used = [track for track in tracks if track.last is not None]
        lowest = min((track.lowest for track in used if track.lowest), default=None)
        lasts = [track.last for track in used if track.last]
        if lowest is None:
            return False
        wrapped = any(track.stepped_back for track in used) or (
            self._reached is not None and lowest <= self._reached
        )
        # Of a walk that began anew some connections may show its end, others its beginning.
        self._reached = min(lasts) if wrapped else max(lasts)
        return wrapped
