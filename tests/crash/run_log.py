"""When the guest ran, on either side; and whether that was ever on both."""

from dataclasses import dataclass


@dataclass(slots=True)
class Span:
    """A time in which one side ran the guest.

    Attributes:
        side: ``source`` or ``destination``.
        start: Instant, in any unit of one clock.
        end: Instant, or None while it lasts.
    """

    side: str
    start: int
    end: int | None = None

    def overlaps(self, other: "Span") -> bool:
        """Whether both lasted at one instant."""
        ends_first = self.end is not None and self.end <= other.start
        begins_last = other.end is not None and other.end <= self.start
        return not ends_first and not begins_last


class RunLog:
    """Collects what the guests themselves say: QEMU's events, a simulated guest's life."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def runs(self, side: str, at: int) -> None:
        """It runs there from now on."""
        if not self._lasting(side):
            self.spans.append(Span(side, at))

    def stands(self, side: str, at: int) -> None:
        """It does not run there any more: it stopped, or what ran it is dead."""
        for span in self._lasting(side):
            span.end = at

    def _lasting(self, side: str) -> list[Span]:
        return [span for span in self.spans if span.side == side and span.end is None]

    def is_running(self, side: str) -> bool:
        """Whether it runs there, as far as was said."""
        return bool(self._lasting(side))

    def ran(self, side: str) -> bool:
        """Whether it ever ran there."""
        return any(span.side == side for span in self.spans)

    def wrongs(self, *, fenced: bool = False) -> list[str]:
        """What no migration may do.

        Args:
            fenced: A person said that what the guest did at the destination may be lost.
        """
        here = [span for span in self.spans if span.side == "source"]
        there = [span for span in self.spans if span.side == "destination"]
        found = ["ran on both sides at once" for a in here for b in there if a.overlaps(b)]
        if not fenced:
            found += [
                "went on at the source from before it ran at the destination"
                for a in here
                for b in there
                if a.start >= b.start
            ]
        return sorted(set(found))
