"""Landed RAM without a QEMU."""

import numpy as np
from numpy.typing import NDArray

from proto.guest_events import PAGE_SIZE
from proto.link.page_lists import Pages


class MemoryBlock:
    """A RAM block in an array; see ``migrate.pages.landed.LandedBlock``.

    Attributes:
        data: Its content, shape (pages, 4096).
        zeroed: Pages that were to be zeroed, in order, with repeats.
    """

    def __init__(self, page_count: int, *, fresh: bool) -> None:
        self.fresh = fresh
        self.data = np.zeros((page_count, PAGE_SIZE), np.uint8)
        self.zeroed: list[int] = []

    def write(self, pages: Pages, data: NDArray[np.uint8]) -> None:
        _check(pages)
        self.data[pages] = data

    def zero(self, pages: Pages) -> None:
        _check(pages)
        self.zeroed += pages.tolist()
        self.data[pages] = 0

    def read_into(self, pages: Pages, out: NDArray[np.uint8]) -> None:
        _check(pages)
        out[:] = self.data[pages]


def _check(pages: Pages) -> None:
    """What every caller has promised."""
    assert len(pages)
    assert (np.diff(pages.astype(np.int64)) > 0).all()
