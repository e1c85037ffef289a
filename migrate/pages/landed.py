"""RAM of the destination guest that pages are written into in place, instead of into a stream.

What stands here is what ``apply`` needs of it; where the RAM is and how it is reached (another
process, a mapped file) is the destination guest's.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.ma  # np.unique loads it at its first call: 10 ms amid a migration
from numpy.typing import NDArray

from proto.guest_events import PAGE_SIZE, RamBlock


class LandedBlock(Protocol):
    """One RAM block of the destination guest, while nothing runs in it.

    Page numbers are within the block, u32, strictly increasing, shape (n,), and checked by the
    link protocol. Calls are synchronous and come one at a time, from one thread.

    Attributes:
        fresh: All of it is zero until we write to it.
    """

    fresh: bool

    def write(self, pages: NDArray[np.uint32], data: NDArray[np.uint8]) -> None:
        """Write ``data``, shape (n, 4096), to ``pages``.

        Raises:
            LandingError: The memory cannot be reached.
        """
        ...

    def zero(self, pages: NDArray[np.uint32]) -> None:
        """Make ``pages`` zero; memory that is zero already is not touched, nor allocated.

        Raises:
            LandingError: The memory cannot be reached.
        """
        ...

    def read_into(self, pages: NDArray[np.uint32], out: NDArray[np.uint8]) -> None:
        """Read ``pages`` into ``out``, shape (n, 4096), contiguous.

        Raises:
            LandingError: The memory cannot be reached.
        """
        ...


class LandedRam:
    """All landed blocks as slots: every page of the guest counts, blocks in order."""

    def __init__(self, blocks: Sequence[RamBlock], landed: Mapping[int, LandedBlock]) -> None:
        self._ends = np.cumsum([block.page_count for block in blocks])
        self._landed = landed

    def read_into(self, slots: NDArray[np.uint32], out: NDArray[np.uint8]) -> None:
        """Copy the pages of ``slots``, in any order and with repeats, into ``out``, (n, 4096).

        Args:
            slots: Only of pages of landed blocks, as the link protocol makes sure.
            out: Rows may be apart.

        Raises:
            LandingError: The memory cannot be reached.
        """
        wanted, places = np.unique(slots, return_inverse=True)
        found = np.empty((len(wanted), PAGE_SIZE), np.uint8)
        for block, ram in self._landed.items():
            end = int(self._ends[block])
            begin = int(self._ends[block - 1]) if block else 0
            first, last = np.searchsorted(wanted, (begin, end))
            if first < last:
                ram.read_into(wanted[first:last] - np.uint32(begin), found[first:last])
        out[:] = found[places]

    def write(self, slots: NDArray[np.uint32], data: NDArray[np.uint8]) -> None:
        """Nothing goes into a slot as such; what lands is in its page already."""
