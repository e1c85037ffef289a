"""virtio-balloon: the host asks for pages, the guest's driver gives them, and gets them back.

Queues: inflate, deflate, statistics. The driver gives pages of one range, lowest first, and
takes them back in reverse; it tells the host before it uses a page again. The statistics queue
holds one buffer that the device keeps until it wants fresh numbers: a request in flight nearly
all the time.

Source: virtio 1.2, 5.5.
"""

import struct
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import numpy as np

from migrate.errors import ParamsError
from migrate.simulation.options import (
    Option,
    Reader,
    microseconds,
    milliseconds,
    period_ms,
    virtio_table,
    whole,
)
from migrate.simulation.virtio.device import VirtioDevice, Virtqueue, Wiring
from migrate.simulation.virtio.layout import Element
from migrate.simulation.virtio.ring import fields_of
from proto.errors import MessageError
from proto.packing import boolean, integer, record, sequence

INFLATE: Final = 0
DEFLATE: Final = 1
STATISTICS: Final = 2

MUST_TELL_HOST_FEATURE: Final = 0
STATS_VQ_FEATURE: Final = 1

PAGE_BYTES: Final = 4096
"""A balloon counts in pages of 4 KiB whatever the guest's page size is."""

MAX_PAGES: Final = 1 << 24
"""64 GiB."""

MAX_STEPS: Final = 4096
_MAX_RUNS: Final = 1 << 16
_PFN_BYTES: Final = 4
_STATISTIC: Final = struct.Struct("<HQ")
_STATISTICS: Final = (4, 5)
"""Tags of free and total memory."""


def _schedule(where: str, value: object) -> list[tuple[int, int]]:
    """Read pairs of milliseconds and pages, in order of time."""
    when, pages = milliseconds(), whole(0, MAX_PAGES)
    steps = value if isinstance(value, list | tuple) else [None]
    read = []
    for step in steps[: MAX_STEPS + 1]:
        if not isinstance(step, list | tuple) or len(step) != 2:
            raise ParamsError(f"{where}: expected pairs [milliseconds, pages], got {step!r}")
        read.append((when(where, step[0]), pages(where, step[1])))
    if len(read) > MAX_STEPS or read != sorted(read, key=lambda step: step[0]):  # type: ignore[return-value, arg-type]
        raise ParamsError(f"{where}: expected at most {MAX_STEPS} steps in order of time")
    return read  # type: ignore[return-value]


_read_schedule: Reader = _schedule

BALLOON_TABLE: Final[Mapping[str, Option]] = {
    **virtio_table(queue_size=128),
    "first_page": Option(0, whole(0, MAX_PAGES)),
    "page_count": Option(0, whole(0, MAX_PAGES)),
    "targets": Option((), _read_schedule),
    "chunk_pages": Option(256, whole(1, 256)),
    "chunk_us": Option(200.0, microseconds(low_ns=1), "chunk_ns"),
    "stats_ms": Option(1000.0, period_ms, "stats_ns"),
}
"""``first_page``, ``page_count``: what the guest can spare. ``targets``: [milliseconds since
power-on, pages] that the host asks for. ``chunk_us``: what the guest takes to find up to
``chunk_pages``. ``stats_ms``: between the host's looks at the statistics, 0 = never."""

_PAGE: Final = integer(0, MAX_PAGES)
_FIELDS: Final = {
    "target": _PAGE,
    "actual": _PAGE,
    "moving": _PAGE,
    "inflating": boolean,
    "chunk_pending": boolean,
    "inflated": sequence(record(_PAGE, _PAGE), _MAX_RUNS),
}


class BalloonDevice(VirtioDevice):
    """A balloon, the host that squeezes, and the driver that gives in.

    Attributes:
        inflated: Which pages the host may take, as the device half knows it, shape (pages of RAM,).
    """

    kind = "virtio-balloon"
    EVENTS: ClassVar = {"target": MAX_STEPS, "config": 0, "chunk": 0, "stats": 0}
    COUNTERS: ClassVar = ("inflated", "deflated", "bad_pages", "stats_read")

    def __init__(self, name: str, options: dict[str, Any], wiring: Wiring) -> None:
        super().__init__(name, options, wiring)
        self.features |= 1 << MUST_TELL_HOST_FEATURE | 1 << STATS_VQ_FEATURE
        for _ in range(3):
            self._add_queue(num=min(options["queue_size"], 1024))
        self._pfns_at = self._area.take(_PFN_BYTES * options["chunk_pages"], 4096)
        self._stats_at = self._area.take(_STATISTIC.size * len(_STATISTICS))
        self._ram_pages = wiring.ram_cpu.length_bytes // PAGE_BYTES
        self._first: int = options["first_page"]
        if self._first + options["page_count"] > self._ram_pages:
            raise ParamsError(
                f"{name}: page_count: pages {self._first} to "
                f"{self._first + options['page_count']} of {self._ram_pages} in RAM"
            )
        begin, length = wiring.area
        end = self._first + options["page_count"]
        if self._first * PAGE_BYTES < begin + length and begin < end * PAGE_BYTES:
            raise ParamsError(f"{name}: first_page: the balloon's own rings lie in its pages")
        self.inflated = np.zeros(self._ram_pages, np.bool_)
        self._target = self._actual = self._moving = 0
        self._inflating = self._chunk_pending = False
        self._add_events(
            {
                "target": self._new_target,
                "config": self._config_changed,
                "chunk": self._move_chunk,
                "stats": self._ask_stats,
            },
            {},
        )

    @property
    def actual_pages(self) -> int:
        """Pages that the driver has given, as it says in the configuration space."""
        return self._actual

    def statistics(self) -> dict[str, int]:
        """Counters of device and queues, and how far the balloon is."""
        return {
            **super().statistics(),
            "target_pages": self._target,
            "actual_pages": self._actual,
        }

    def _power_on(self) -> None:
        for queue in self.queues:
            queue.driver.listen()
            queue.device.listen()
        if self._options["targets"]:
            self._timers.after(self._options["targets"][0][0], "target", 0)
        if self._options["stats_ns"]:
            self._post_stats()
            self._timers.after(self._options["stats_ns"], "stats")

    # The host's wishes.

    def _new_target(self, step: int) -> None:
        targets = self._options["targets"]
        if step >= len(targets):
            return
        due_ns, self._target = targets[step]
        self._timers.after(self.queues[INFLATE].interrupt_ns, "config")
        if step + 1 < len(targets):
            self._timers.after(targets[step + 1][0] - due_ns, "target", step + 1)

    # The driver half.

    def _config_changed(self, _: int) -> None:
        wanted = min(self._target, self._options["page_count"])
        if not self._moving and not self._chunk_pending and wanted != self._actual:
            self._chunk_pending = True
            self._timers.after(self._options["chunk_ns"] + self._take_debt(), "chunk")

    def _move_chunk(self, _: int) -> None:
        self._chunk_pending = False
        wanted = min(self._target, self._options["page_count"])
        if self._moving or wanted == self._actual:
            return
        self._inflating = wanted > self._actual
        self._moving = min(abs(wanted - self._actual), self._options["chunk_pages"])
        first = self._first + self._actual - (0 if self._inflating else self._moving)
        pages = np.arange(first, first + self._moving, dtype="<u4")
        self._ram.write(self._pfns_at, pages.tobytes())
        queue = self.queues[INFLATE if self._inflating else DEFLATE]
        queue.driver.add(self._moving, ((self._pfns_at, _PFN_BYTES * self._moving),))
        self._publish(queue)

    def _on_interrupt(self, queue: Virtqueue) -> None:
        driver = queue.driver
        while True:
            for token, _ in driver.take_used():
                if queue.index == STATISTICS:
                    self._post_stats()
                else:
                    self._actual += token if self._inflating else -token
                    self._moving = 0
            if driver.listen():
                break
        self._config_changed(0)

    def _post_stats(self) -> None:
        total = self._ram_pages * PAGE_BYTES
        values = (total - self._actual * PAGE_BYTES, total)
        data = b"".join(map(_STATISTIC.pack, _STATISTICS, values))
        self._ram.write(self._stats_at, data)
        queue = self.queues[STATISTICS]
        queue.driver.add(0, ((self._stats_at, len(data)),))
        self._publish(queue)

    # The device half.

    def _on_kick(self, queue: Virtqueue) -> None:
        device = queue.device
        while True:
            taken = device.pop()
            if queue.index != STATISTICS:
                for element in taken:
                    self._take_pages(queue, element)
                    device.push(element.head, 0)
                if taken:
                    self._give_back(queue)
            if device.broken is not None or device.listen():
                return

    def _take_pages(self, queue: Virtqueue, element: Element) -> None:
        for address, length in element.readable:
            if length % _PFN_BYTES or length > 1 << 20:
                self._break(queue, f"page numbers in {length} bytes")
                return
            pages = np.frombuffer(self._wiring.ram_dma.read(address, length), "<u4")
            inside = np.unique(pages[pages < self._ram_pages])
            # Giving a page twice, or back without having given it, is the guest's mistake.
            moved = inside[self.inflated[inside] == (queue.index == DEFLATE)].astype(np.uint32)
            self.counters["bad_pages"] += len(pages) - len(moved)
            self.inflated[moved] = queue.index == INFLATE
            if queue.index == INFLATE:
                self.counters["inflated"] += len(moved)
                self._wiring.discard(moved)
            else:
                self.counters["deflated"] += len(moved)
                self._wiring.reclaim(moved)

    def _ask_stats(self, _: int) -> None:
        queue = self.queues[STATISTICS]
        for element in list(queue.device.in_flight.values()):
            self.counters["stats_read"] += 1
            queue.device.push(element.head, 0)
            self._give_back(queue)
        self._timers.after(self._options["stats_ns"], "stats")

    # State.

    def _save_own(self) -> dict[str, Any]:
        pages = np.flatnonzero(self.inflated)
        starts = np.flatnonzero(np.diff(pages, prepend=-2) != 1)
        counts = np.diff(np.append(starts, len(pages)))
        return {
            "target": self._target,
            "actual": self._actual,
            "moving": self._moving,
            "inflating": self._inflating,
            "chunk_pending": self._chunk_pending,
            "inflated": np.column_stack((pages[starts], counts)).tolist(),
        }

    def _load_own(self, where: str, state: object) -> None:
        found = fields_of(where, _FIELDS, state)
        inflated = np.zeros(self._ram_pages, np.bool_)
        end = 0
        for first, count in found["inflated"]:
            # Ascending runs inside RAM: a hostile state cannot ask for more memory than that.
            if first < end or first + count > self._ram_pages:
                raise MessageError(where, "pages of RAM, ascending", f"{first} + {count}")
            end = first + count
            inflated[first:end] = True
        if found["actual"] > self._options["page_count"]:
            raise MessageError(
                where, f"at most {self._options['page_count']} pages", str(found["actual"])
            )
        self.inflated = inflated
        for key in ("target", "actual", "moving", "inflating", "chunk_pending"):
            setattr(self, f"_{key}", found[key])
