"""A queue between two stages that is bounded by bytes, not by items.

The bound may change while it runs: in pre-copy it is small, because what waits here is bandwidth
that QEMU believes in and the link does not have; while the guest is stopped it is large, because a
source QEMU whose stream is not read then holds its main lock.
"""

from collections import deque
from typing import Generic, TypeVar

import trio

T = TypeVar("T")


class Backlog(Generic[T]):
    """First in, first out; ``put`` waits while the bytes inside reach the limit.

    Attributes:
        bytes_waiting: Bytes of the items inside.
        limit_bytes: Where ``put`` begins to wait; one item always fits.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._items: deque[tuple[T, int]] = deque()
        self._lot = trio.lowlevel.ParkingLot()
        self.bytes_waiting = 0
        self.limit_bytes = limit_bytes

    async def put(self, item: T, size_bytes: int) -> None:
        """Append an item that stands for ``size_bytes``; no checkpoint where there is room.

        So whoever takes is woken once for a burst, not for each of its items.
        """
        while self.bytes_waiting >= self.limit_bytes:
            await self._lot.park()
        self.put_nowait(item, size_bytes)

    def put_nowait(self, item: T, size_bytes: int) -> None:
        """Append an item whatever the limit says."""
        self._items.append((item, size_bytes))
        self.bytes_waiting += size_bytes
        self._lot.unpark_all()

    async def get(self) -> T:
        """Take the oldest item, waiting for one."""
        while not self._items:
            await self._lot.park()
        item, size_bytes = self._items.popleft()
        self.bytes_waiting -= size_bytes
        self._lot.unpark_all()
        return item

    async def get_burst(self, max_bytes: int) -> list[T]:
        """Take the oldest item, waiting for one, and those behind it up to ``max_bytes`` in all."""
        items = [await self.get()]
        room = max_bytes
        while self._items and (room := room - self._items[0][1]) >= 0:
            items.append(await self.get())
        return items

    def set_limit(self, limit_bytes: int) -> None:
        """Change the limit; what is inside stays."""
        self.limit_bytes = limit_bytes
        self._lot.unpark_all()

    @property
    def is_empty(self) -> bool:
        """Nothing waits."""
        return not self._items
