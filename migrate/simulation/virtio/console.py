"""virtio-console, port 0: numbered lines in both directions.

Source: virtio 1.2, 5.3 (without the multiport feature: queue 0 receives, queue 1 transmits).
"""

from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from migrate.errors import ParamsError
from migrate.simulation.options import (
    MIN_PERIOD_NS,
    Option,
    milliseconds,
    period_ms,
    virtio_table,
    whole,
)
from migrate.simulation.virtio.device import VirtioDevice, Virtqueue, Wiring
from migrate.simulation.virtio.ring import U64, fields_of
from proto.errors import MessageError
from proto.packing import boolean, integer, sequence

RECEIVE: Final = 0
TRANSMIT: Final = 1

LINE_BYTES: Final = 64
_MAX_TYPED: Final = 4096
_PIPE_BYTES: Final = 1 << 16

CONSOLE_TABLE: Final[Mapping[str, Option]] = {
    **virtio_table(queue_size=64),
    "line_ms": Option(10.0, milliseconds(low_ns=MIN_PERIOD_NS), "line_ns"),
    "lines_at_once": Option(1, whole(1, 64)),
    "input_ms": Option(100.0, period_ms, "input_ns"),
}
"""``line_ms``: between the guest's writes of ``lines_at_once`` lines. ``input_ms``: between
lines that somebody types at the host, 0 = nobody does."""

_FIELDS: Final = {
    "lines_written": U64,
    "lines_seen": U64,
    "lines_typed": U64,
    "lines_got": U64,
    "tx_free": sequence(integer(0, 32767), 32768),
    "typed": sequence(U64, _MAX_TYPED),
    "draining": boolean,
}


def line_text(prefix: str, number: int) -> bytes:
    """Build the line of a number, ``LINE_BYTES`` long."""
    return f"{prefix} {number:016d} ".encode().ljust(LINE_BYTES - 1, b".") + b"\n"


class ConsoleDevice(VirtioDevice):
    """A console whose lines are numbered, so that a lost or repeated one shows.

    Attributes:
        lines_written: Lines that the guest put into the ring.
        lines_seen: Lines that the host saw, each the next one after the last.
        lines_typed: Lines typed at the host.
        lines_got: Those that the guest got, each the next one.
    """

    kind = "virtio-console"
    EVENTS: ClassVar = {"line": 0, "transmitted": 0}
    OUTSIDE_EVENTS: ClassVar = {"type": 0}
    COUNTERS: ClassVar = ("order_errors", "lines_dropped")

    def __init__(self, name: str, options: dict[str, Any], wiring: Wiring) -> None:
        super().__init__(name, options, wiring)
        num: int = options["queue_size"]
        if num > 1024:
            raise ParamsError(f"{name}: queue_size: expected at most 1024, got {num}")
        self._add_queue()
        self._add_queue()
        self._rx_at = self._area.take(LINE_BYTES * num, 4096)
        self._tx_at = self._area.take(LINE_BYTES * num, 4096)
        self._tx_free = list(range(num - 1, -1, -1))
        self._typed: deque[int] = deque()
        self._draining = False
        self.lines_written = self.lines_seen = self.lines_typed = self.lines_got = 0
        self._add_events(
            {"line": self._write_lines, "transmitted": self._transmitted},
            {"type": self._type_line},
        )

    def drain(self) -> None:
        """Write and type no more lines."""
        self._draining = True

    def statistics(self) -> dict[str, int]:
        """Counters of device, queues and lines."""
        return {
            **super().statistics(),
            "lines_written": self.lines_written,
            "lines_seen": self.lines_seen,
            "lines_typed": self.lines_typed,
            "lines_got": self.lines_got,
        }

    def _power_on(self) -> None:
        receive, transmit = self.queues
        for buffer in range(receive.driver.place.num):
            self._post(buffer)
        self._publish(receive)
        receive.driver.listen()
        transmit.driver.silence()
        receive.device.silence()
        transmit.device.listen()
        self._timers.after(self._options["line_ns"], "line")
        if self._options["input_ns"]:
            self._outside.after(self._options["input_ns"], "type")

    def _post(self, buffer: int) -> None:
        self.queues[RECEIVE].driver.add(
            buffer, (), ((self._rx_at + LINE_BYTES * buffer, LINE_BYTES),)
        )

    def _on_kick(self, queue: Virtqueue) -> None:
        if queue.index == RECEIVE:
            self._hand_in()
        else:
            self._take_out()

    def _on_interrupt(self, queue: Virtqueue) -> None:
        driver = queue.driver
        if queue.index == TRANSMIT:
            self._reclaim()
            driver.silence()
            return
        while True:
            used = driver.take_used()
            for buffer, written in used:
                self._get_line(buffer, written)
                self._post(buffer)
            if used:
                self._publish(queue)
            if driver.listen():
                return

    # Lines of the guest.

    def _write_lines(self, _: int) -> None:
        if self._draining:
            return
        queue = self.queues[TRANSMIT]
        self._reclaim()
        added = False
        for _ in range(self._options["lines_at_once"]):
            if not (self._tx_free and queue.driver.has_room(1)):
                self.counters["lines_dropped"] += 1
                continue
            slot = self._tx_free.pop()
            self.lines_written += 1
            address = self._tx_at + LINE_BYTES * slot
            self._ram.write(address, line_text("guest", self.lines_written))
            queue.driver.add(slot, ((address, LINE_BYTES),))
            added = True
        if added:
            self._publish(queue)
        self._timers.after(self._options["line_ns"] + self._take_debt(), "line")

    def _reclaim(self) -> None:
        queue = self.queues[TRANSMIT]
        self._tx_free.extend(slot for slot, _ in queue.driver.take_used())

    def _take_out(self) -> None:
        device = self.queues[TRANSMIT].device
        if device.in_flight:
            return
        device.silence()
        while True:
            taken = device.pop(8)
            if taken:
                self._timers.after(1_000 * len(taken), "transmitted")
                return
            if device.broken is not None or device.listen():
                return

    def _transmitted(self, _: int) -> None:
        queue, ram = self.queues[TRANSMIT], self._wiring.ram_dma
        for element in list(queue.device.in_flight.values()):
            if sum(length for _, length in element.readable) > _PIPE_BYTES:
                self._break(queue, "more than a pipe takes")
                return
            data = b"".join(ram.read(*segment) for segment in element.readable)
            if data == line_text("guest", self.lines_seen + 1):
                self.lines_seen += 1
            else:
                self.counters["order_errors"] += 1
            queue.device.push(element.head, 0)
        self._give_back(queue)
        self._take_out()

    # Lines of the host.

    def _type_line(self, _: int) -> None:
        if self._draining:
            return
        # Of a gap with too many lines the rest was never typed.
        self.counters["lines_dropped"] += self._outside.late_ns // self._options["input_ns"]
        if len(self._typed) < _MAX_TYPED:
            self.lines_typed += 1
            self._typed.append(self.lines_typed)
            self._hand_in()
        else:
            self.counters["lines_dropped"] += 1
        self._outside.after(self._options["input_ns"], "type")

    def _hand_in(self) -> None:
        queue = self.queues[RECEIVE]
        pushed = False
        while self._typed:
            taken = queue.device.pop(1)
            if not taken:
                if queue.device.broken is not None or queue.device.listen():
                    break
                continue
            if not taken[0].writable or taken[0].writable[0][1] < LINE_BYTES:
                self._break(queue, "no room for a line")
                break
            line = line_text("host", self._typed.popleft())
            self._wiring.ram_dma.write(taken[0].writable[0][0], line)
            queue.device.push(taken[0].head, LINE_BYTES)
            pushed = True
        if pushed:
            self._give_back(queue)

    def _get_line(self, buffer: int, written: int) -> None:
        data = self._ram.read(self._rx_at + LINE_BYTES * buffer, min(written, LINE_BYTES))
        if data == line_text("host", self.lines_got + 1):
            self.lines_got += 1
        else:
            self.counters["order_errors"] += 1

    # State.

    def _save_own(self) -> dict[str, Any]:
        return {
            "lines_written": self.lines_written,
            "lines_seen": self.lines_seen,
            "lines_typed": self.lines_typed,
            "lines_got": self.lines_got,
            "tx_free": list(self._tx_free),
            "typed": list(self._typed),
            "draining": self._draining,
        }

    def _load_own(self, where: str, state: object) -> None:
        found = fields_of(where, _FIELDS, state)
        num, free = self._options["queue_size"], found["tx_free"]
        if len(set(free)) != len(free) or any(slot >= num for slot in free):
            raise MessageError(where, f"buffers below {num}, each once", "others")
        flying = self.queues[TRANSMIT].driver.outstanding
        if len(free) + flying != num:
            raise MessageError(where, f"{num - flying} free buffers", str(len(free)))
        for key in ("lines_written", "lines_seen", "lines_typed", "lines_got"):
            setattr(self, key, found[key])
        self._tx_free = list(free)
        self._typed = deque(found["typed"])
        self._draining = found["draining"]
