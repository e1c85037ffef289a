"""virtio-net: a client's requests come in by the receive queue, answers leave by the other one.

    client ─▶ host backlog ─▶ receive queue ─▶ driver ─▶ server ─▶ transmit queue ─▶ client

Frames carry a number and a checksum over what lies in guest RAM; what does not arrive as it was
sent is counted as damaged and its request is never answered.

Source: virtio 1.2, 5.1.
"""

import struct
from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from migrate.errors import ParamsError
from migrate.simulation.client import (
    ANNOUNCEMENT,
    CLIENT_TABLE,
    PACKET_HEAD,
    REQUEST,
    RESPONSE,
    Client,
    ClientOptions,
    number_in,
    packet,
)
from migrate.simulation.options import (
    VHOST_TABLE,
    Option,
    microseconds,
    period_ms,
    virtio_table,
    whole,
)
from migrate.simulation.server import SERVER_TABLE, Server
from migrate.simulation.virtio.device import VirtioDevice, Virtqueue, Wiring
from migrate.simulation.virtio.layout import Element
from migrate.simulation.virtio.ring import U64, fields_of
from proto.errors import MessageError
from proto.packing import boolean, integer, sequence

RECEIVE: Final = 0
TRANSMIT: Final = 1
CONTROL: Final = 2

NET_HEADER: Final = struct.Struct("<BBHHHHH")
"""Flags, GSO type, header length, GSO size, checksum start and offset, number of buffers."""

CTRL_VQ_FEATURE: Final = 17
CTRL_RX_FEATURE: Final = 18
GUEST_ANNOUNCE_FEATURE: Final = 21

CTRL_RX: Final = 0
CTRL_RX_PROMISC: Final = 0
CTRL_ANNOUNCE: Final = 3
CTRL_ANNOUNCE_ACK: Final = 0
CTRL_OK: Final = 0
CTRL_ERR: Final = 1

_CONTROL_NUM: Final = 64
_ANNOUNCE_AGAIN_NS: Final = 1_000_000
"""Until the driver looks again whether it can announce where it is."""

_LONGEST_FRAME: Final = 1 << 17
_MAX_BACKLOG: Final = 65536
_POLL_BUDGET: Final = 64
"""Frames that the driver takes in one go, as Linux does in a NAPI poll."""

NET_TABLE: Final[Mapping[str, Option]] = {
    **virtio_table(queue_size=256, packed=True),
    **VHOST_TABLE,
    **CLIENT_TABLE,
    **SERVER_TABLE,
    "rx_buffers": Option(0, whole(0, 32768)),
    "backlog_packets": Option(500, whole(1, _MAX_BACKLOG)),
    "transmit_us": Option(1.0, microseconds(1e6), "transmit_ns"),
    "batch": Option(1, whole(1, 64)),
    "control_ms": Option(250.0, period_ms, "control_ns"),
}
"""``rx_buffers``: 0 posts as many as the queue holds. ``backlog_packets``: what the host keeps
while the guest has posted none, or stands still; more are dropped. ``batch``: answers that the
driver makes available at once. ``control_ms``: between commands on the control queue, 0 = none."""

_FIELDS: Final = {
    "client": lambda where, value: value,
    "server": lambda where, value: value,
    "backlog": sequence(U64, _MAX_BACKLOG),
    "to_send": sequence(U64, 65536),
    "tx_free": sequence(integer(0, 32767), 32768),
    "unpublished": integer(0, 64),
    "rx_paused": boolean,
    "promiscuous": boolean,
    "promiscuous_wanted": boolean,
    "announce": boolean,
    "draining": boolean,
}


class NetDevice(VirtioDevice):
    """A network device with the guest's server behind it and the client in front of it."""

    kind = "virtio-net"
    EVENTS: ClassVar = {**Server.EVENTS, "transmitted": 0, "control": 0, "config": 0}
    OUTSIDE_EVENTS: ClassVar = Client.EVENTS
    COUNTERS: ClassVar = (
        "rx_packets", "rx_dropped", "rx_damaged", "tx_packets", "tx_damaged", "announcements",
        "controls", "control_errors",
    )  # fmt: skip

    def __init__(self, name: str, options: dict[str, Any], wiring: Wiring) -> None:
        super().__init__(name, options, wiring)
        self.features |= 1 << CTRL_VQ_FEATURE | 1 << CTRL_RX_FEATURE
        self.features |= 1 << GUEST_ANNOUNCE_FEATURE
        self._rx = self._add_queue()
        self._tx = self._add_queue(table_entries=2)
        self._control = self._add_queue(
            num=min(_CONTROL_NUM, max(4, options["queue_size"])), table_entries=4, fast=False
        )
        self._lay_out_buffers()
        self._filler = self._chance.octets(max(self._request_bytes, self._response_bytes))
        self._backlog: deque[int] = deque()
        self._to_send: deque[int] = deque()
        self._unpublished = 0
        self._rx_paused = False
        self._promiscuous = self._promiscuous_wanted = False
        self._announce = self._draining = False
        self._dma = self._device_ram()
        self.server = Server(
            options,
            timers=self._timers,
            chance=self._chance,
            debt=self._take_debt,
            served=self._respond,
        )
        self.client = Client(
            ClientOptions.of(options),
            timers=self._outside,
            chance=self._chance,
            deliver=self._receive,
            completed=wiring.completed,
        )
        self._add_events(
            {
                "transmitted": self._transmitted,
                "control": self._ask_control,
                "config": self._config_changed,
            },
            {},
        )

    def _lay_out_buffers(self) -> None:
        options = self._options
        num = options["queue_size"]
        self._request_bytes: int = options["request_bytes"]
        self._response_bytes: int = options["response_bytes"]
        self._rx_count: int = options["rx_buffers"] or num
        if self._rx_count > num:
            raise ParamsError(
                f"{self.name}: rx_buffers: expected at most queue_size ({num}), "
                f"got {self._rx_count}"
            )
        if num < 4:
            raise ParamsError(f"{self.name}: queue_size: expected at least 4, got {num}")
        self._rx_bytes = NET_HEADER.size + self._request_bytes
        self._rx_stride = -(-self._rx_bytes // 256) * 256
        self._rx_at = self._area.take(self._rx_stride * self._rx_count, 4096)
        self._tx_stride = -(-(NET_HEADER.size + self._response_bytes) // 256) * 256
        self._tx_at = self._area.take(self._tx_stride * num, 4096)
        self._tx_free = list(range(num - 1, -1, -1))
        self._control_at = self._area.take(64)

    def drain(self) -> None:
        """Have the client send no new requests."""
        self._draining = True
        self.client.drain()

    def statistics(self) -> dict[str, int]:
        """Counters of device, queues and client."""
        return {**super().statistics(), **self.client.statistics()}

    def _power_on(self) -> None:
        for buffer in range(self._rx_count):
            self._post(buffer)
        self._publish(self._rx)
        self._rx.driver.listen()
        self._tx.driver.silence()
        self._control.driver.listen()
        for queue in (self._tx, self._control):
            queue.device.listen()
        self._rx.device.silence()
        if self._options["control_ns"]:
            self._timers.after(self._options["control_ns"], "control")
        self.client.begin()

    def _arrived(self) -> None:
        self._announce = True
        self._timers.after(self._control.interrupt_ns, "config")

    def _on_kick(self, queue: Virtqueue) -> None:
        if queue.index == RECEIVE:
            self._fill()
        elif queue.index == TRANSMIT:
            self._transmit()
        else:
            self._serve_control()

    def _on_interrupt(self, queue: Virtqueue) -> None:
        if queue.index == RECEIVE:
            self._poll()
        elif queue.index == TRANSMIT:
            self._send_waiting()
        else:
            self._take_control()

    # Receive queue: the device half.

    def _receive(self, number: int) -> None:
        if len(self._backlog) >= self._options["backlog_packets"]:
            self.counters["rx_dropped"] += 1
            self.client.lost(number)
            return
        self._backlog.append(number)
        self._fill()

    def _fill(self) -> None:
        queue, header = self._rx, NET_HEADER.pack(0, 0, 0, 0, 0, 0, 1)
        pushed = False
        while self._backlog:
            taken = queue.device.pop(1)
            if not taken:
                if queue.device.broken is not None or queue.device.listen():
                    break
                continue
            number = self._backlog.popleft()
            frame = header + packet(number, REQUEST, self._filler, self._request_bytes)
            written = self._scatter(queue, taken[0], frame)
            queue.device.push(taken[0].head, written)
            pushed = True
        else:
            queue.device.silence()
        if pushed:
            self._give_back(queue)

    def _scatter(self, queue: Virtqueue, element: Element, data: bytes) -> int:
        """Write into the buffers of a request; a frame that does not fit breaks the queue."""
        done = 0
        for address, length in element.writable:
            piece = data[done : done + length]
            if piece:
                self._dma.write(address, piece)
            done += len(piece)
        if done < len(data):
            self._break(queue, f"a receive buffer of {done} bytes for {len(data)}")
        return done

    # Receive queue: the driver half.

    def _post(self, buffer: int) -> None:
        address = self._rx_at + buffer * self._rx_stride
        self._rx.driver.add(buffer, (), ((address, self._rx_bytes),))

    def _poll(self) -> None:
        driver, server = self._rx.driver, self.server
        self._rx_paused = False
        driver.silence()
        while True:
            used = driver.take_used(min(_POLL_BUDGET, server.room))
            for buffer, written in used:
                self._take_frame(buffer, written)
                self._post(buffer)
            if used:
                self._publish(self._rx)
            if server.room <= 0:
                self._rx_paused = True
                return
            if not used and driver.listen():
                return

    def _take_frame(self, buffer: int, written: int) -> None:
        address = self._rx_at + buffer * self._rx_stride
        data = self._ram.read(address, min(written, self._rx_bytes))
        number = number_in(data[NET_HEADER.size :], REQUEST)
        if number is None:
            self.counters["rx_damaged"] += 1
            return
        self.counters["rx_packets"] += 1
        self.server.accept(number)

    # Transmit queue: the driver half.

    def _respond(self, number: int) -> None:
        self._to_send.append(number)
        self._send_waiting()
        if self._rx_paused and self.server.room * 2 >= self._options["accept_queue"]:
            self._poll()

    def _send_waiting(self) -> None:
        driver = self._tx.driver
        self._reclaim()
        while self._to_send:
            if not (self._tx_free and driver.has_room(2)):
                self._flush_tx()
                if driver.listen(max(1, driver.outstanding // 2)):
                    return
                self._reclaim()
                continue
            self._send(self._to_send.popleft(), RESPONSE)
        driver.silence()
        if self._unpublished >= self._options["batch"] or self.server.idle:
            self._flush_tx()

    def _reclaim(self) -> None:
        self._tx_free.extend(slot for slot, _ in self._tx.driver.take_used())

    def _send(self, number: int, direction: int) -> None:
        slot = self._tx_free.pop()
        length = self._response_bytes if direction == RESPONSE else PACKET_HEAD.size
        address = self._tx_at + slot * self._tx_stride
        header = NET_HEADER.pack(0, 0, 0, 0, 0, 0, 0)
        self._ram.write(address, header + packet(number, direction, self._filler, length))
        body = address + NET_HEADER.size, length
        self._tx.driver.add(slot, ((address, NET_HEADER.size), body))
        self._unpublished += 1
        if self._unpublished >= self._options["batch"]:
            self._flush_tx()

    def _flush_tx(self) -> None:
        if self._unpublished:
            self._unpublished = 0
            self._publish(self._tx)

    # Transmit queue: the device half.

    def _transmit(self) -> None:
        device = self._tx.device
        if device.in_flight:
            return
        device.silence()
        while True:
            taken = device.pop(_POLL_BUDGET)
            if taken:
                self._timers.after(self._options["transmit_ns"] * len(taken), "transmitted")
                return
            if device.broken is not None or device.listen():
                return

    def _transmitted(self, _: int) -> None:
        queue = self._tx
        for element in list(queue.device.in_flight.values()):
            self._to_wire(queue, element)
            queue.device.push(element.head, 0)
        self._give_back(queue)
        self._transmit()

    def _to_wire(self, queue: Virtqueue, element: Element) -> None:
        if sum(length for _, length in element.readable) > _LONGEST_FRAME:
            self._break(queue, "a frame that is too long")
            return
        frame = b"".join(self._dma.read(*segment) for segment in element.readable)
        body = frame[NET_HEADER.size :]
        number = number_in(body, RESPONSE)
        if number is not None:
            self.counters["tx_packets"] += 1
            self.client.answered(number)
        elif number_in(body, ANNOUNCEMENT) is not None:
            self.counters["announcements"] += 1
        else:
            self.counters["tx_damaged"] += 1

    # Control queue.

    def _ask_control(self, _: int) -> None:
        if not self._control.driver.outstanding and not self._draining:
            self._promiscuous_wanted = not self._promiscuous_wanted
            wanted = bytes([self._promiscuous_wanted])
            self._command(bytes([CTRL_RX, CTRL_RX_PROMISC]), wanted)
        self._timers.after(self._options["control_ns"], "control")

    def _config_changed(self, _: int) -> None:
        """The device announces that it moved: tell the network, then say that it was told."""
        if not self._announce:
            return
        self._reclaim()
        room = self._tx_free and self._tx.driver.has_room(2)
        if self._control.driver.outstanding or not room:
            self._timers.after(_ANNOUNCE_AGAIN_NS, "config")
            return
        self._send(0, ANNOUNCEMENT)
        self._flush_tx()
        self._command(bytes([CTRL_ANNOUNCE, CTRL_ANNOUNCE_ACK]), b"")

    def _command(self, command: bytes, data: bytes) -> None:
        at = self._control_at
        # An acknowledgement that the device does not write stays an error.
        self._ram.write(at, command + data.ljust(2, b"\0") + bytes([CTRL_ERR]))
        readable = [(at, 2)] + ([(at + 2, len(data))] if data else [])
        self._control.driver.add(command[0], readable, ((at + 4, 1),))
        self._publish(self._control)

    def _serve_control(self) -> None:
        queue, ram = self._control, self._wiring.ram_dma
        while True:
            taken = queue.device.pop()
            for element in taken:
                asked = sum(length for _, length in element.readable)
                data = b"".join(ram.read(*part) for part in element.readable[:4] if asked <= 64)
                if element.writable:
                    ram.write(element.writable[-1][0], bytes([self._obey(data)]))
                queue.device.push(element.head, 1 if element.writable else 0)
            if taken:
                self._give_back(queue)
            if queue.device.broken is not None or queue.device.listen():
                return

    def _obey(self, data: bytes) -> int:
        if data[:2] == bytes([CTRL_RX, CTRL_RX_PROMISC]) and len(data) == 3:
            self._promiscuous = bool(data[2])
            return CTRL_OK
        if data == bytes([CTRL_ANNOUNCE, CTRL_ANNOUNCE_ACK]):
            self._announce = False
            return CTRL_OK
        return CTRL_ERR

    def _take_control(self) -> None:
        driver = self._control.driver
        while True:
            for command, _ in driver.take_used():
                ok = self._ram.read(self._control_at + 4, 1)[0] == CTRL_OK
                obeyed = command != CTRL_RX or self._promiscuous == self._promiscuous_wanted
                self.counters["controls" if ok and obeyed else "control_errors"] += 1
            if driver.listen():
                return

    # State.

    def _save_own(self) -> dict[str, Any]:
        return {
            "client": self.client.save(),
            "server": self.server.save(),
            "backlog": list(self._backlog),
            "to_send": list(self._to_send),
            "tx_free": list(self._tx_free),
            "unpublished": self._unpublished,
            "rx_paused": self._rx_paused,
            "promiscuous": self._promiscuous,
            "promiscuous_wanted": self._promiscuous_wanted,
            "announce": self._announce,
            "draining": self._draining,
        }

    def _load_own(self, where: str, state: object) -> None:
        found = fields_of(where, _FIELDS, state)
        num, free = self._options["queue_size"], found["tx_free"]
        flying = self._tx.driver.outstanding
        if len(set(free)) != len(free) or any(slot >= num for slot in free):
            raise MessageError(where, f"buffers below {num}, each once", "others")
        if len(free) + flying != num:
            raise MessageError(where, f"{num - flying} free buffers", str(len(free)))
        self.client.load(f"{where}.client", found["client"])
        self.server.load(f"{where}.server", found["server"])
        self._backlog = deque(found["backlog"])
        self._to_send = deque(found["to_send"])
        self._tx_free = list(free)
        for key in ("unpublished", "rx_paused", "promiscuous", "promiscuous_wanted"):
            setattr(self, f"_{key}", found[key])
        self._announce = found["announce"]
        self._draining = found["draining"]
