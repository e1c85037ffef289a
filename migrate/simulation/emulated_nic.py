"""A network card of the time before virtio: registers, an on-chip FIFO, an interrupt per packet.

    client ─▶ host backlog ─▶ FIFO ─▶ interrupt ─▶ 6 accesses ─▶ server ─▶ 3 accesses ─▶ client

Same client, server and packets as virtio-net. For each packet received the driver reads the cause
of the interrupt and the packet's length, says where in RAM it shall go, frees the FIFO's slot
and lets interrupts in again; for each packet sent it writes address, length and go, and takes an
interrupt of its own. The registers' names are of the e1000 family, whose real driver would batch.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from migrate.simulation.client import (
    CLIENT_TABLE,
    REQUEST,
    RESPONSE,
    Client,
    ClientOptions,
    number_in,
    packet,
)
from migrate.simulation.emulated import EMULATED_TABLE, EmulatedDevice
from migrate.simulation.options import Option, microseconds, whole
from migrate.simulation.server import SERVER_TABLE, Server
from migrate.simulation.virtio.device import Wiring
from migrate.simulation.virtio.ring import U64, fields_of
from proto.errors import MessageError
from proto.packing import boolean, integer, sequence

_MAX_FIFO: Final = 256
_MAX_BACKLOG: Final = 65536

NIC_TABLE: Final[Mapping[str, Option]] = {
    **EMULATED_TABLE,
    **CLIENT_TABLE,
    **SERVER_TABLE,
    "rx_fifo": Option(16, whole(1, _MAX_FIFO)),
    "tx_slots": Option(8, whole(1, _MAX_FIFO)),
    "backlog_packets": Option(500, whole(0, _MAX_BACKLOG)),
    "transmit_us": Option(1.0, microseconds(1e6), "transmit_ns"),
}
"""``rx_fifo``: packets the chip holds. ``backlog_packets``: what the host keeps while that is full
or the guest stands still; more are dropped. ``tx_slots``: packets given to the chip at a time."""

PROGRAMS: Final[Mapping[str, tuple[str, ...]]] = {
    "receive": ("ICR", "IMC", "RXLEN", "RXADDR", "RDT", "IMS"),
    "transmit": ("TXADDR", "TXLEN", "TDT"),
    "reclaim": ("ICR", "TDH"),
}
"""Register accesses per packet received, sent, and per interrupt for one that has left."""

_FIELDS: Final = {
    "client": lambda where, value: value,
    "server": lambda where, value: value,
    "backlog": sequence(U64, _MAX_BACKLOG),
    "fifo": sequence(U64, _MAX_FIFO),
    "rx_next": integer(0, _MAX_FIFO - 1),
    "rx_signalled": boolean,
    "rx_paused": boolean,
    "to_send": sequence(U64, 65536),
    "tx_free": sequence(integer(0, _MAX_FIFO - 1), _MAX_FIFO),
    "tx_queue": sequence(integer(0, _MAX_FIFO - 1), _MAX_FIFO),
}


class EmulatedNic(EmulatedDevice):
    """A NIC with the guest's server behind it and the client in front of it."""

    kind = "nic"
    OUTSIDE_EVENTS: ClassVar = Client.EVENTS
    COUNTERS: ClassVar = (
        "rx_packets", "rx_dropped", "rx_damaged", "tx_packets", "tx_damaged",
    )  # fmt: skip

    def __init__(self, name: str, options: dict[str, Any], wiring: Wiring) -> None:
        super().__init__(
            name,
            options,
            wiring,
            PROGRAMS,
        )
        self._request_bytes: int = options["request_bytes"]
        self._response_bytes: int = options["response_bytes"]
        self._rx_stride = -(-self._request_bytes // 256) * 256
        self._tx_stride = -(-self._response_bytes // 256) * 256
        self._rx_at = self._area.take(self._rx_stride * options["rx_fifo"], 4096)
        self._tx_at = self._area.take(self._tx_stride * options["tx_slots"], 4096)
        self._filler = self._chance.octets(max(self._request_bytes, self._response_bytes))
        self._backlog: deque[int] = deque()
        self._fifo: deque[int] = deque()
        self._rx_next = 0
        self._rx_signalled = self._rx_paused = False
        self._to_send: deque[int] = deque()
        self._tx_free = list(range(options["tx_slots"] - 1, -1, -1))
        self._tx_queue: deque[int] = deque()
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
            deliver=self._arrive,
            completed=wiring.completed,
        )
        self._add_events(
            {
                "received": lambda _: self._run_routine("receive", self._rx_next),
                "sent": self._sent,
                "left": lambda slot: self._run_routine("reclaim", slot),
            }
        )

    def drain(self) -> None:
        """Have the client send no new requests."""
        self.client.drain()

    def statistics(self) -> dict[str, int]:
        """Counters of device, driver and client; ``exits`` are register accesses."""
        return {**super().statistics(), **self.client.statistics()}

    def _power_on(self) -> None:
        self.client.begin()

    def _events(self) -> dict[str, int]:
        last_slot = self._options["tx_slots"] - 1
        return {**Server.EVENTS, "received": 0, "sent": last_slot, "left": last_slot}

    # The card.

    def _arrive(self, number: int) -> None:
        """A packet comes from the network, also while the guest stands still."""
        if len(self._fifo) < self._options["rx_fifo"] and not self._backlog:
            self._fifo.append(number)
        elif len(self._backlog) < self._options["backlog_packets"]:
            self._backlog.append(number)
        else:
            self.counters["rx_dropped"] += 1
            self.client.lost(number)
        self._signal()

    def _signal(self) -> None:
        """Raise the receive interrupt, unless the driver is at it or has no room."""
        if self._fifo and not self._rx_signalled and not self._rx_paused:
            self._rx_signalled = True
            self.counters["interrupts"] += 1
            self._timers.after(self._options["interrupt_ns"], "received")

    def _touch(self, register: str, argument: int) -> None:
        if register == "RXADDR" and self._fifo:
            data = packet(self._fifo[0], REQUEST, self._filler, self._request_bytes)
            self._dma.write(self._rx_at + argument * self._rx_stride, data)
        elif register == "RDT" and self._fifo:
            self._fifo.popleft()
            if self._backlog:
                self._fifo.append(self._backlog.popleft())
        elif register == "TDT":
            self._tx_queue.append(argument)
            if len(self._tx_queue) == 1:
                self._timers.after(self._options["transmit_ns"], "sent", argument)

    def _sent(self, slot: int) -> None:
        """The card has read a packet from RAM and sends it."""
        data = self._dma.read(self._tx_at + slot * self._tx_stride, self._response_bytes)
        number = number_in(data, RESPONSE)
        if number is None:
            self.counters["tx_damaged"] += 1
        else:
            self.counters["tx_packets"] += 1
            self.client.answered(number)
        self.counters["interrupts"] += 1
        self._timers.after(self._options["interrupt_ns"], "left", slot)
        if self._tx_queue:
            self._tx_queue.popleft()
        if self._tx_queue:
            self._timers.after(self._options["transmit_ns"], "sent", self._tx_queue[0])

    # The driver.

    def _routine_done(self, routine: str, argument: int) -> None:
        if routine == "receive":
            self._take_packet(argument)
        elif routine == "reclaim":
            self._tx_free.append(argument)
            self._send_waiting()

    def _take_packet(self, buffer: int) -> None:
        self._rx_next = (buffer + 1) % self._options["rx_fifo"]
        data = self._ram.read(self._rx_at + buffer * self._rx_stride, self._request_bytes)
        number = number_in(data, REQUEST)
        if number is None:
            self.counters["rx_damaged"] += 1
        else:
            self.counters["rx_packets"] += 1
            self.server.accept(number)
        self._rx_signalled = False
        self._rx_paused = self.server.room <= 0
        self._signal()

    def _respond(self, number: int) -> None:
        self._to_send.append(number)
        self._send_waiting()
        if self._rx_paused and self.server.room > 0:
            self._rx_paused = False
            self._signal()

    def _send_waiting(self) -> None:
        while self._to_send and self._tx_free:
            slot = self._tx_free.pop()
            number = self._to_send.popleft()
            data = packet(number, RESPONSE, self._filler, self._response_bytes)
            self._ram.write(self._tx_at + slot * self._tx_stride, data)
            self._run_routine("transmit", slot)

    # State.

    def _save_own(self) -> dict[str, Any]:
        return {
            "client": self.client.save(),
            "server": self.server.save(),
            "backlog": list(self._backlog),
            "fifo": list(self._fifo),
            "rx_next": self._rx_next,
            "rx_signalled": self._rx_signalled,
            "rx_paused": self._rx_paused,
            "to_send": list(self._to_send),
            "tx_free": list(self._tx_free),
            "tx_queue": list(self._tx_queue),
        }

    def _load_own(self, where: str, state: object) -> None:
        found = fields_of(where, _FIELDS, state)
        slots, fifo = self._options["tx_slots"], self._options["rx_fifo"]
        for key in ("tx_free", "tx_queue"):
            if len(set(found[key])) != len(found[key]) or max(found[key], default=0) >= slots:
                raise MessageError(
                    f"{where}.{key}", f"slots below {slots}, each once", "others"
                )
        if len(found["fifo"]) > fifo or found["rx_next"] >= fifo:
            raise MessageError(where, f"a FIFO of {fifo}", "a larger one")
        self._check_routines(where, {"receive": fifo, "transmit": slots, "reclaim": slots})
        self.client.load(f"{where}.client", found["client"])
        self.server.load(f"{where}.server", found["server"])
        for key in ("backlog", "fifo", "to_send", "tx_queue"):
            setattr(self, f"_{key}", deque(found[key]))
        self._tx_free = list(found["tx_free"])
        for key in ("rx_next", "rx_signalled", "rx_paused"):
            setattr(self, f"_{key}", found[key])
