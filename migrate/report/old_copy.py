"""The report's parts about a guest's RAM that was kept on a host."""

from dataclasses import dataclass


@dataclass(slots=True)
class CheckpointReport:
    """What the source kept of the guest that left (``--checkpoint``).

    Attributes:
        path: The file.
        kept: It is there, complete but for ``missing_pages``.
        pages: Pages in it; all others were zero.
        missing_pages: Pages of which it has only an older version, or none: the disk was slow.
        file_bytes: What it takes up on the disk.
        given_up: Why there is none; ``None`` = there is, or it did not come to that.
    """

    path: str
    kept: bool = False
    pages: int = 0
    missing_pages: int = 0
    file_bytes: int = 0
    given_up: str | None = None


@dataclass(slots=True)
class OldCopyReport:
    """What was there already on the host that the guest came to.

    Attributes:
        announced_pages: Different pages, zero pages left out, that the destination found.
        referenced_pages: Pages that travelled as a reference to one of them.
        saved_bytes: Content of these pages, uncompressed, that did not travel.
        age_s: Seconds since the guest had left there; only the destination knows.
    """

    announced_pages: int
    referenced_pages: int = 0
    saved_bytes: int = 0
    age_s: float | None = None
