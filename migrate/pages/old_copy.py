"""Pages of an old copy as slots behind all others, as either side sees them."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from migrate.pages.digest_index import DigestIndex
from migrate.pages.digests import Digests


@dataclass(frozen=True, slots=True)
class OldSlots:
    """Source: what the destination announced so far.

    Attributes:
        index: Digests by page of the old copy; more may be appended.
        first_slot: Slot of its first page.
    """

    index: DigestIndex
    first_slot: int

    def find(self, digests: Digests) -> tuple[NDArray[np.bool_], NDArray[np.uint32]]:
        """Look digests up; which were found, shape (n,), and their slots, shape (n,)."""
        found, numbers = self.index.find(digests)
        return found, numbers + np.uint32(self.first_slot)


class Slots(Protocol):
    """Pages that a batch may refer to."""

    def read_into(self, slots: NDArray[np.uint32], out: NDArray[np.uint8]) -> None:
        """Copy the pages of ``slots`` into ``out``, shape (n, 4096); rows may be apart."""
        ...


class SlotsWithOldCopy:
    """Destination: the slots of page cache or landed RAM, and those of an old copy behind them."""

    def __init__(self, others: Slots, old_pages: Slots, first_old: int) -> None:
        """Join them.

        Args:
            others: Slots below ``first_old``.
            old_pages: Numbered from 0.
            first_old: Slot of the old copy's first page.
        """
        self._others = others
        self._old_pages = old_pages
        self._first_old = np.uint32(first_old)

    def read_into(self, slots: NDArray[np.uint32], out: NDArray[np.uint8]) -> None:
        """Copy the pages of ``slots`` into ``out``, shape (n, 4096); rows may be apart.

        Raises:
            OldCopyError: A page of the old copy is not what was announced.
            PeerProtocolError: It was not announced.
        """
        old = slots >= self._first_old
        if old.all():
            self._old_pages.read_into(slots - self._first_old, out)
            return
        if not old.any():
            self._others.read_into(slots, out)
            return
        for of, rows, first in (
            (self._others, ~old, np.uint32(0)),
            (self._old_pages, old, self._first_old),
        ):
            wanted = slots[rows] - first
            pages = np.empty((len(wanted), out.shape[1]), np.uint8)
            of.read_into(wanted, pages)
            out[rows] = pages
