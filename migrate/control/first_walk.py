"""How much of a guest's memory its source has yet to look at.

Pure. A stream begins with a walk over all of RAM in which every page comes once, zero pages too.
Before its end the guest is not stopped. Later rounds are of a size that nobody knows beforehand.
"""

from collections.abc import Iterable

from proto.guest_events import PAGE_SIZE, GuestEvent, PageRun, RamBlocks, Switchover, ZeroRun


class FirstWalk:
    """That of one stream.

    Attributes:
        to_come_bytes: What is still to come of the walk; 0 before it and behind it.
    """

    def __init__(self) -> None:
        self.to_come_bytes = 0

    def see(self, events: Iterable[GuestEvent]) -> None:
        """Take in what the source sent next."""
        for event in events:
            match event:
                case RamBlocks(blocks):
                    self.to_come_bytes = sum(block.used_length for block in blocks)
                case PageRun() | ZeroRun():
                    rest = self.to_come_bytes - len(event.pages) * PAGE_SIZE
                    self.to_come_bytes = max(rest, 0)
                case Switchover():
                    self.to_come_bytes = 0

    def see_remaining(self, remaining_bytes: int) -> None:
        """Take in what the source says of itself: with free-page hints it leaves pages out."""
        self.to_come_bytes = min(self.to_come_bytes, remaining_bytes)
