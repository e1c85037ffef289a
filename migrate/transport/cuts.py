"""What became of a link's cuts: for the report, the screen and tests."""

from dataclasses import dataclass

MAX_LISTED = 1000
"""Cuts that are kept one by one; the sums count all."""


@dataclass(frozen=True, slots=True)
class Cut:
    """One time without a link that ended.

    Attributes:
        began_s: When the link was last known to work, on trio's clock.
        outage_s: How long until it was there again.
        resent_bytes: What this end had to send again.
        cause: How it was noticed, in words.
    """

    began_s: float
    outage_s: float
    resent_bytes: int
    cause: str


class CutLog:
    """All cuts of one link.

    Attributes:
        count: How many there were.
        outage_s: Seconds without a link, all together.
        listed: The first ones.
    """

    def __init__(self) -> None:
        self.count = 0
        self.outage_s = 0.0
        self.listed: list[Cut] = []

    def add(self, cut: Cut) -> None:
        """Count one."""
        self.count += 1
        self.outage_s += cut.outage_s
        if len(self.listed) < MAX_LISTED:
            self.listed.append(cut)


@dataclass(slots=True)
class Outage:
    """A time without a link that goes on.

    Attributes:
        began_s: When the link was last known to work, on trio's clock.
        noticed_s: When it was noticed that it does not.
        cause: How it was noticed, in words.
        last_attempt: Why the latest attempt to end it failed; empty if there was none.
    """

    began_s: float
    noticed_s: float
    cause: str
    last_attempt: str = ""
