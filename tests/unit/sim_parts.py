"""The least that a simulated device needs around it, and a second look at its rings.

RAM is a bytearray whose views mark pages dirty; the scheduler is a heap. Both are as simple as
the protocols of ``migrate.simulation.base`` allow, so that what a test finds is the device's.
"""

import heapq
import struct
from collections.abc import Callable, Iterable
from typing import Any

import msgpack  # noqa: TID251 - as the state travels, and as nothing else
import numpy as np
from numpy.typing import NDArray

from migrate.simulation.virtio.device import VirtioDevice
from migrate.simulation.virtio.factory import make_device
from proto.virtqueue import VirtqueueState

PAGE = 4096
MS = 1_000_000
S = 1_000_000_000


class PlainRam:
    """Bytes; every view has its own set of dirty pages, ``None`` = it forgets."""

    def __init__(self, length_bytes: int) -> None:
        self.data = bytearray(length_bytes)
        self.dirty: set[int] = set()

    def view(self, dirty: set[int] | None) -> "PlainView":
        return PlainView(self.data, dirty)

    def copy_pages(self, source: "PlainRam", pages: Iterable[int]) -> None:
        for page in pages:
            at = slice(page * PAGE, page * PAGE + PAGE)
            self.data[at] = source.data[at]


class PlainView:
    def __init__(self, data: bytearray, dirty: set[int] | None) -> None:
        self.length_bytes = len(data)
        self._data = data
        self._dirty = dirty

    def read(self, address: int, length: int) -> bytes:
        if not 0 <= address <= address + length <= self.length_bytes:
            raise ValueError(f"{length} bytes at {address:#x}")
        return bytes(self._data[address : address + length])

    def write(self, address: int, data: bytes) -> None:
        end = address + len(data)
        if not 0 <= address <= end <= self.length_bytes:
            raise ValueError(f"{len(data)} bytes at {address:#x}")
        self._data[address:end] = data
        if self._dirty is not None and data:
            self._dirty.update(range(address // PAGE, (end - 1) // PAGE + 1))


class PlainScheduler:
    def __init__(self, now_ns: int = 0) -> None:
        self.now_ns = now_ns
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._asked = 0

    def after(self, delay_ns: int, action: Callable[[], None]) -> None:
        assert delay_ns >= 0
        self._asked += 1
        heapq.heappush(self._heap, (self.now_ns + delay_ns, self._asked, action))

    def count_event(self) -> None:
        """Everybody may be as busy as they like."""

    def may_make_up(self) -> bool:
        return True

    def step(self) -> bool:
        """Live through one event; whether there was one."""
        if not self._heap:
            return False
        self.now_ns, _, action = heapq.heappop(self._heap)
        action()
        return True

    def run_until(self, time_ns: int) -> None:
        while self._heap and self._heap[0][0] <= time_ns:
            self.step()
        self.now_ns = max(self.now_ns, time_ns)


class Host:
    """One host's half of a migration: RAM, a scheduler, one device.

    Attributes:
        done: Instants at which requests were sent and done, as reported.
        ballooned: Pages that the balloon has taken.
    """

    def __init__(
        self,
        kind: str,
        options: dict[str, Any],
        *,
        ram_bytes: int = 4 << 20,
        area: tuple[int, int] = (PAGE, 2 << 20),
        seed: int = 1,
        now_ns: int = 0,
        track_dma: bool = True,
    ) -> None:
        self.ram = PlainRam(ram_bytes)
        self.vhost_log: set[int] = set()
        self.scheduler = PlainScheduler(now_ns)
        self.done: list[tuple[int, int]] = []
        self.ballooned: set[int] = set()
        self.device: VirtioDevice = make_device(
            kind,
            f"{kind}.0",
            options,
            ram_cpu=self.ram.view(self.ram.dirty),
            ram_dma=self.ram.view(self.ram.dirty if track_dma else None),
            ram_vhost=self.ram.view(self.vhost_log if track_dma else None),
            scheduler=self.scheduler,
            seed=seed,
            area=area,
            completed=lambda sent, done: self.done.append((sent, done)),
            discard=self._discard,
            reclaim=self._reclaim,
        )

    def _discard(self, pages: NDArray[np.uint32]) -> None:
        assert not self.ballooned & set(pages.tolist())
        self.ballooned.update(pages.tolist())
        for page in pages.tolist():
            self.ram.data[page * PAGE : page * PAGE + PAGE] = bytes(PAGE)

    def _reclaim(self, pages: NDArray[np.uint32]) -> None:
        assert self.ballooned >= set(pages.tolist())
        self.ballooned.difference_update(pages.tolist())

    def run(self, duration_ns: int) -> None:
        self.scheduler.run_until(self.scheduler.now_ns + duration_ns)

    def harvest(self) -> set[int]:
        """Take the dirty pages of both logs, and clear them."""
        dirty = self.ram.dirty | self.vhost_log
        self.ram.dirty.clear()
        self.vhost_log.clear()
        return dirty


def through_msgpack(state: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = msgpack.unpackb(
        msgpack.packb(state), use_list=True, strict_map_key=True
    )
    return found


def check_rings(device: VirtioDevice, data: bytearray) -> None:
    """The rules of a ring at rest, straight from the specification, not from the device."""
    for queue, state in zip(device.queues, device.virtqueues(), strict=True):
        assert queue.device.broken is None
        assert queue.driver.broken is None
        assert state.used_idx is not None
        if state.packed:
            _check_packed(state, data)
        else:
            _check_split(state, data)


def _check_split(state: VirtqueueState, data: bytearray) -> None:
    num = state.num
    (avail_idx,) = struct.unpack_from("<H", data, state.avail + 2)
    (used_idx,) = struct.unpack_from("<H", data, state.used + 2)
    assert used_idx == state.used_idx
    assert (avail_idx - state.last_avail_idx) % 65536 <= num
    in_flight = (state.last_avail_idx - used_idx) % 65536
    assert in_flight == state.in_flight
    assert (avail_idx - used_idx) % 65536 <= num
    waiting = [
        struct.unpack_from("<H", data, state.avail + 4 + 2 * (index % num))[0]
        for index in range(avail_idx - (avail_idx - state.last_avail_idx) % 65536, avail_idx)
    ]
    assert len(set(waiting)) == len(waiting)
    assert all(head < num for head in waiting)


def _check_packed(state: VirtqueueState, data: bytearray) -> None:
    assert state.used_idx is not None
    lap = 0 if state.last_avail_wrap == state.used_wrap else state.num
    assert 0 <= state.last_avail_idx - state.used_idx + lap <= state.num
    flags = [
        struct.unpack_from("<H", data, state.desc + 16 * slot + 14)[0]
        for slot in range(state.num)
    ]
    if state.in_flight == 0:
        # Where the device writes next nothing can be used already, as the driver would see it.
        avail, used = bool(flags[state.used_idx] >> 7 & 1), bool(flags[state.used_idx] >> 15)
        assert not avail == used == state.used_wrap
