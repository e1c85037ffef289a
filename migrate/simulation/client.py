"""The client of a guest's service: it stands outside, and its clock does not stop.

It sends numbered requests and waits for the answers; what happens in between is the business of
the network device that it is given. While the guest stands still requests go on being sent, and
answers that were on the wire arrive.
"""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from migrate.simulation.chance import Chance
from migrate.simulation.options import (
    Option,
    microseconds,
    milliseconds,
    real,
    whole,
    word,
)
from migrate.simulation.timers import MAX_AHEAD_NS, Timers
from migrate.simulation.virtio.ring import U64, fields_of
from proto.errors import MessageError
from proto.packing import boolean, integer, record, sequence

MAX_OUTSTANDING: Final = 65536

CLIENT_TABLE: Final = {
    "mode": Option("open", word("open", "closed")),
    "rate_per_s": Option(1000.0, real(0.001, 1e6)),
    "arrivals": Option("poisson", word("poisson", "fixed")),
    "users": Option(8, whole(1, 4096)),
    "think_us": Option(0.0, microseconds(), "think_ns"),
    "wire_us": Option(50.0, microseconds(), "wire_ns"),
    "resend_ms": Option(200.0, milliseconds(low_ns=1_000_000), "resend_ns"),
    "max_outstanding": Option(4096, whole(1, MAX_OUTSTANDING)),
    "request_bytes": Option(256, whole(16, 65536)),
    "response_bytes": Option(1024, whole(16, 65536)),
}
"""``open``: requests at a rate, whatever the guest does. ``closed``: users who wait for their
answer and think. Requests that the host dropped are sent again after ``resend_ms``."""

PACKET_HEAD: Final = struct.Struct("<QII")
"""Number of the request, direction, CRC-32 of the rest."""

REQUEST: Final = 0x51455155
RESPONSE: Final = 0x50534552
ANNOUNCEMENT: Final = 0x50524147
"""What a guest sends after a migration so that the network learns where it is."""

_FIELDS: Final = {
    "next_number": integer(0, (1 << 63) - 1),
    "draining": boolean,
    "sent": U64,
    "completed": U64,
    "resent": U64,
    "unexpected": U64,
    "not_sent": U64,
    "outstanding": sequence(
        record(U64, integer(-MAX_AHEAD_NS, MAX_AHEAD_NS), integer(0, 4095)), MAX_OUTSTANDING
    ),
}


def packet(number: int, direction: int, filler: bytes, length: int) -> bytes:
    """Build a packet of ``length`` bytes (>= 16); ``filler`` has at least as many."""
    body = filler[: length - PACKET_HEAD.size]
    check = zlib.crc32(body, number & 0xFFFFFFFF)
    return PACKET_HEAD.pack(number, direction, check) + body


def number_in(data: bytes, direction: int) -> int | None:
    """Read a packet's number; ``None`` if it is damaged or goes the other way."""
    if len(data) < PACKET_HEAD.size:
        return None
    number, found, check = PACKET_HEAD.unpack_from(data)
    if found != direction:
        return None
    body = memoryview(data)[PACKET_HEAD.size :]
    return number if zlib.crc32(body, number & 0xFFFFFFFF) == check else None


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """How the client behaves; see ``CLIENT_TABLE`` for units and limits.

    Attributes:
        closed: Users who wait, instead of a rate.
        rate_per_s: Requests per second of an open loop.
        poisson: Whether their gaps are exponential or all the same.
        users: Of a closed loop.
        think_ns: From a user's answer to the next request.
        wire_ns: One way between client and host.
        resend_ns: From a request that was dropped to its repetition.
        max_outstanding: Above that the open loop leaves requests out, and counts them.
    """

    closed: bool
    rate_per_s: float
    poisson: bool
    users: int
    think_ns: int
    wire_ns: int
    resend_ns: int
    max_outstanding: int

    @classmethod
    def of(cls, options: dict[str, Any]) -> "ClientOptions":
        """Take them from what ``read_options`` made of ``CLIENT_TABLE``."""
        return cls(
            options["mode"] == "closed",
            options["rate_per_s"],
            options["arrivals"] == "poisson",
            options["users"],
            options["think_ns"],
            options["wire_ns"],
            options["resend_ns"],
            options["max_outstanding"],
        )


class Client:
    """Sends requests, waits for answers.

    Attributes:
        sent: Requests sent, repetitions not counted.
        completed: Answered requests.
        resent: Repetitions of requests that were dropped.
        unexpected: Answers to what was not asked, or was answered already. Never, if all is well.
        not_sent: Requests that the open loop left out.
    """

    EVENTS: Final = {
        "client-send": 4095,
        "client-arrive": (1 << 64) - 1,
        "client-answer": (1 << 64) - 1,
        "client-resend": (1 << 64) - 1,
    }

    def __init__(
        self,
        options: ClientOptions,
        *,
        timers: Timers,
        chance: Chance,
        deliver: Callable[[int], None],
        completed: Callable[[int, int], None],
    ) -> None:
        """Stand outside of a guest.

        Args:
            options: How to behave.
            timers: On the clock outside; the client adds its actions.
            chance: Shared with the device, which saves it.
            deliver: Called with the number of a request that has come to the host.
            completed: Called with the instants a request was first sent and answered at.
        """
        self.sent = self.completed = self.resent = self.unexpected = self.not_sent = 0
        self._options = options
        self._timers = timers
        self._chance = chance
        self._deliver = deliver
        self._report = completed
        self._next_number = 1
        self._draining = False
        self._outstanding: dict[int, tuple[int, int]] = {}
        timers.actions.update(
            {
                "client-send": self._send,
                "client-arrive": deliver,
                "client-answer": self._answer,
                "client-resend": self._resend,
            }
        )

    @property
    def outstanding(self) -> int:
        """Requests that wait for their answer."""
        return len(self._outstanding)

    def statistics(self) -> dict[str, int]:
        """Counters, under the names that devices report them with."""
        return {
            "requests_sent": self.sent,
            "requests_completed": self.completed,
            "requests_outstanding": self.outstanding,
            "requests_resent": self.resent,
            "requests_not_sent": self.not_sent,
            "unexpected_answers": self.unexpected,
        }

    def begin(self) -> None:
        """Schedule the first requests; users begin one after the other."""
        if not self._options.closed:
            self._timers.after(self._gap_ns(), "client-send")
            return
        for user in range(self._options.users):
            self._timers.after(user * 1_000, "client-send", user)

    def drain(self) -> None:
        """Send no new requests; repetitions go on."""
        self._draining = True

    def lost(self, number: int) -> None:
        """Learn that the host dropped a request; a real client would from its time-out."""
        self._timers.after(self._options.resend_ns, "client-resend", number)

    def answered(self, number: int) -> None:
        """Learn that an answer has left the host."""
        self._timers.after(self._options.wire_ns, "client-answer", number)

    def save(self) -> dict[str, Any]:
        """State as plain data; instants count from now."""
        now_ns = self._timers.now_ns
        return {
            "next_number": self._next_number,
            "draining": self._draining,
            "sent": self.sent,
            "completed": self.completed,
            "resent": self.resent,
            "unexpected": self.unexpected,
            "not_sent": self.not_sent,
            "outstanding": [
                [number, sent_at_ns - now_ns, user]
                for number, (sent_at_ns, user) in self._outstanding.items()
            ],
        }

    def load(self, where: str, state: object) -> None:
        """Take over what ``save`` gave, after the timers.

        Raises:
            MessageError: It is not that.
        """
        found = fields_of(where, _FIELDS, state)
        now_ns = self._timers.now_ns
        outstanding = {
            number: (now_ns + sent_ns, user) for number, sent_ns, user in found["outstanding"]
        }
        if len(outstanding) != len(found["outstanding"]):
            raise MessageError(where, "each request once", "one twice")
        if found["sent"] != found["completed"] + len(outstanding):
            raise MessageError(where, "counters that add up", f"{len(outstanding)} outstanding")
        self._outstanding = outstanding
        self._next_number = found["next_number"]
        self._draining = found["draining"]
        for key in ("sent", "completed", "resent", "unexpected", "not_sent"):
            setattr(self, key, found[key])

    def _gap_ns(self) -> int:
        mean_ns = 1e9 / self._options.rate_per_s
        if self._options.poisson:
            return round(self._chance.exponential(mean_ns))
        return max(1, round(mean_ns))

    def _send(self, user: int) -> None:
        if self._draining:
            return
        options, timers = self._options, self._timers
        if not options.closed:
            timers.after(self._gap_ns(), "client-send")
            # Of a gap with too many requests the rest was never sent.
            self.not_sent += round(timers.late_ns * options.rate_per_s / 1e9)
        if len(self._outstanding) >= options.max_outstanding:
            self.not_sent += 1
            return
        number = self._next_number
        self._next_number += 1
        self.sent += 1
        self._outstanding[number] = (timers.now_ns, user)
        self._to_host(number)

    def _to_host(self, number: int) -> None:
        if self._options.wire_ns:
            self._timers.after(self._options.wire_ns, "client-arrive", number)
        else:
            self._deliver(number)

    def _resend(self, number: int) -> None:
        if number in self._outstanding:
            self.resent += 1
            self._to_host(number)

    def _answer(self, number: int) -> None:
        request = self._outstanding.pop(number, None)
        if request is None:
            self.unexpected += 1
            return
        sent_at_ns, user = request
        self.completed += 1
        self._report(sent_at_ns, self._timers.now_ns)
        if self._options.closed:
            self._timers.after(self._options.think_ns, "client-send", user)
