"""The account of pages and bytes: every page under one class, every byte under one kind.

Pure. The rule it lives for: what the source wrote to the link equals the sum of ``bytes``, to
the byte (``Ledger.close``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Final


@dataclass(slots=True)
class PageCounts:
    """Guest pages by class.

    Attributes:
        zero: All zero.
        same: The destination holds this content at this address already.
        ref: The destination holds it elsewhere.
        delta: Sent as a difference to the destination's version.
        literal: Sent in full, compressed where that helps.
    """

    zero: int = 0
    same: int = 0
    ref: int = 0
    delta: int = 0
    literal: int = 0

    def total(self) -> int:
        """Pages of all classes."""
        return self.zero + self.same + self.ref + self.delta + self.literal


@dataclass(slots=True)
class ByteCounts:
    """Bytes on the link by what they carried; attributes of page classes as in ``PageCounts``.

    Attributes:
        zero: Page lists of zero pages.
        same: Page lists of pages the destination has.
        ref: Page lists and references.
        delta: Page lists and encoded differences.
        literal: Page lists and encoded pages.
        opaque: Parts of QEMU's stream that are not RAM and come before the device state.
        device_state: The device state at the end.
        control: Frame headers and messages between the two commands.
        resent: Everything sent a second time after a lost connection.
    """

    zero: int = 0
    same: int = 0
    ref: int = 0
    delta: int = 0
    literal: int = 0
    opaque: int = 0
    device_state: int = 0
    control: int = 0
    resent: int = 0

    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(getattr(self, kind) for kind in BYTE_KINDS)


PAGE_CLASSES: Final = tuple(item.name for item in fields(PageCounts))
"""``zero``, ``same``, ``ref``, ``delta``, ``literal``: in order of cost."""

BYTE_KINDS: Final = tuple(item.name for item in fields(ByteCounts))


@dataclass(slots=True)
class RoundCounts:
    """The account of one round.

    Attributes:
        round_no: 0 = bulk.
        started_ns: When it began, on the caller's clock.
        ended_ns: When the next one began or the ledger was closed; ``None`` while it runs.
        pages: Pages by class.
        wire_bytes: All bytes that went out while it ran, whatever their kind.
    """

    round_no: int
    started_ns: int
    ended_ns: int | None = None
    pages: PageCounts = field(default_factory=PageCounts)
    wire_bytes: int = 0


class UnbalancedError(ValueError):
    """The account does not close: some bytes were counted twice or never.

    Attributes:
        wire_bytes: What the link says was written.
        accounted_bytes: The sum over all kinds.
    """

    def __init__(self, wire_bytes: int, accounted_bytes: int) -> None:
        super().__init__(
            f"{wire_bytes} bytes written to the link, {accounted_bytes} accounted for "
            f"({wire_bytes - accounted_bytes:+d})"
        )
        self.wire_bytes = wire_bytes
        self.accounted_bytes = accounted_bytes


class Ledger:
    """Count pages and bytes, in total and per round.

    What is added before the first round counts in the totals only. Adding is cheap enough for
    every batch; it is not meant for every page.
    """

    def __init__(self) -> None:
        self.pages = PageCounts()
        self.bytes = ByteCounts()
        self._rounds: list[RoundCounts] = []

    @property
    def rounds(self) -> tuple[RoundCounts, ...]:
        """All rounds so far, the last one perhaps still running."""
        return tuple(self._rounds)

    @property
    def wire_bytes(self) -> int:
        """Sum over all kinds of bytes."""
        return self.bytes.total()

    def start_round(self, round_no: int, now_ns: int) -> RoundCounts:
        """End the running round and begin the next.

        Raises:
            ValueError: ``round_no`` is not the next number, counted from 0. Nothing is changed.
        """
        if round_no != len(self._rounds):
            raise ValueError(f"expected round {len(self._rounds)}, got {round_no}")
        self._end_round(now_ns)
        self._rounds.append(RoundCounts(round_no, now_ns))
        return self._rounds[-1]

    def add_pages(
        self,
        round_no: int,
        pages_by_class: Mapping[str, int],
        bytes_by_class: Mapping[str, int],
    ) -> None:
        """Count a batch of pages and the bytes that carried it.

        Args:
            round_no: Round the pages belong to: a batch may leave after the next one began.
            pages_by_class: Pages for each of ``PAGE_CLASSES`` that occurs.
            bytes_by_class: Wire bytes for each of ``BYTE_KINDS`` that occurs.

        Raises:
            ValueError: Unknown round, class or kind, or a negative count. Nothing is changed.
        """
        if not 0 <= round_no < len(self._rounds):
            raise ValueError(f"round {round_no} was not started")
        _check(pages_by_class, PAGE_CLASSES)
        _check(bytes_by_class, BYTE_KINDS)
        this_round = self._rounds[round_no]
        _add(self.pages, pages_by_class)
        _add(this_round.pages, pages_by_class)
        _add(self.bytes, bytes_by_class)
        this_round.wire_bytes += sum(bytes_by_class.values())

    def add_bytes(self, kind: str, n_bytes: int) -> None:
        """Count bytes that carry no page; they go to the round that runs.

        Raises:
            ValueError: Unknown kind or a negative count. Nothing is changed.
        """
        _check({kind: n_bytes}, BYTE_KINDS)
        _add(self.bytes, {kind: n_bytes})
        if self._rounds:
            self._rounds[-1].wire_bytes += n_bytes

    def close(self, wire_bytes: int, now_ns: int) -> None:
        """End the last round and check the account against what the link counted itself.

        Raises:
            UnbalancedError: The sums differ. The counts stay as they are and can be reported.
        """
        self._end_round(now_ns)
        if self.wire_bytes != wire_bytes:
            raise UnbalancedError(wire_bytes, self.wire_bytes)

    def _end_round(self, now_ns: int) -> None:
        if self._rounds and self._rounds[-1].ended_ns is None:
            self._rounds[-1].ended_ns = now_ns


def _check(counts: Mapping[str, int], names: tuple[str, ...]) -> None:
    for name, count in counts.items():
        if name not in names:
            raise ValueError(f"expected one of {', '.join(names)}, got '{name}'")
        if count < 0:
            raise ValueError(f"expected a count of '{name}', got {count}")


def _add(sums: PageCounts | ByteCounts, counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        setattr(sums, name, getattr(sums, name) + count)
