"""Pages picked from a batch, in its memory: copied only where something needs them together.

Most batches of a first walk have a few pages that need not travel. To copy the others together
costs as much as the kernel takes to send them, and the kernel takes them in pieces as well.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from proto.guest_events import PAGE_SIZE

Rows = NDArray[np.uint8]
"""Content of n pages, shape (n, 4096)."""

MAX_PIECES: Final = 32
"""More pieces than that cost more than a copy: each is a buffer of its own all the way."""

LEAST_SHARE: Final = 0.75
"""Fewer of the pages are copied at once, or they would hold on to the memory of all."""

NO_ROWS: Final = np.empty((0, PAGE_SIZE), np.uint8)


class PickedRows:
    """Rows of a batch; whoever has them owns its memory with others, so nobody writes there."""

    def __init__(self, rows: Rows, which: NDArray[np.bool_] | None = None) -> None:
        """Pick rows.

        Args:
            rows: Shape (n, 4096).
            which: Shape (n,); ``None`` = all.
        """
        if which is not None:
            count = int(np.count_nonzero(which))
            if count == len(rows):
                which = None
            elif count < LEAST_SHARE * len(rows):
                rows, which = rows[which], None
            self._count = count
        else:
            self._count = len(rows)
        self._rows, self._which = rows, which

    def __len__(self) -> int:
        """Number of pages."""
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of these pages."""
        return self._count * PAGE_SIZE

    def pick(self, which: NDArray[np.bool_]) -> "PickedRows":
        """Pick some of these, shape (len,)."""
        if self._which is None:
            return PickedRows(self._rows, which)
        of_all = self._which.copy()
        of_all[self._which] = which
        return PickedRows(self._rows, of_all)

    @property
    def array(self) -> Rows:
        """All of them, shape (len, 4096); a copy, made once, unless they are all of the batch."""
        if self._which is not None:
            self._rows, self._which = self._rows[self._which], None
        return self._rows

    @property
    def pieces(self) -> tuple[Rows, ...]:
        """What follows each other, each piece contiguous; copied only if that is better."""
        if self._which is not None and self._rows.flags.c_contiguous:
            edges = np.flatnonzero(np.diff(self._which, prepend=False, append=False))
            if len(edges) <= 2 * MAX_PIECES:
                ends = edges.tolist()
                pairs = zip(ends[::2], ends[1::2], strict=True)
                return tuple(self._rows[start:end] for start, end in pairs)
        return (np.ascontiguousarray(self.array),) if self._count else ()


NOTHING_PICKED: Final = PickedRows(NO_ROWS)
