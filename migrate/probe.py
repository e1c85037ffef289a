"""A client of the guest's echo service: what it notices of the migration becomes ``service``.

Sends numbered UDP datagrams at a fixed rate, whatever comes back (an open loop: a client that
waits for answers would ask less while the guest stands still and so hide it), and hands the times
to a ``ServiceRecorder``. Nothing here can make a migration fail; what goes wrong is a warning.

A request's time is that of its ``send``; an answer's is the kernel's time stamp of its arrival, so
that an engine busy elsewhere does not look like a slow guest.
"""

import secrets
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import trio

from migrate.params import ProbeTarget
from migrate.report.ledger import Ledger
from migrate.report.report import Report
from migrate.report.service import ServiceRecorder
from migrate.units import NS_PER_S

AFTER_S: Final = 1.0
"""How long the service is watched after the guest runs at the destination."""

LOST_S: Final = 5.0
"""A request without an answer for so long is lost."""

LAST_ANSWERS_S: Final = 1.0
"""Longest wait for answers to the last requests."""

MOST_BEHIND_NS: Final = NS_PER_S
"""What a probe that was held up catches up on; requests older than this are never sent."""

MAGIC: Final = b"precopy?"
DATAGRAM: Final = struct.Struct(">8s8sQ")
"""Magic, this probe's random mark, number of the request."""

_SO_TIMESTAMPNS: Final = 35
_TIMESPEC: Final = struct.Struct("qq")
"""Linux: the kernel's time of arrival comes beside each datagram, on its realtime clock."""


@dataclass(frozen=True, slots=True)
class MigrationPhases:
    """Where the probe looks up when a phase of the migration began.

    Attributes:
        ledger: Knows the rounds.
        stopped_ns: Returns when the guest was stopped, or ``None``.
        running_ns: Returns when it ran at the destination, or ``None``.
    """

    ledger: Ledger
    stopped_ns: Callable[[], int | None]
    running_ns: Callable[[], int | None]


class Probe:
    """Watches one service; made by ``open_probe``. Without a target everything does nothing."""

    def __init__(self, target: ProbeTarget | None, warn: Callable[[str], None]) -> None:
        self._target = target
        self._warn = warn
        self._mark = secrets.token_bytes(8)
        self._opened = trio.Event()
        self._stop_sending = trio.CancelScope()
        self._recorder: ServiceRecorder | None = None
        self._begun_s = 0.0
        self._phases: MigrationPhases | None = None
        self._rounds_marked = 0
        self._stopped_ns: int | None = None
        self._after_marked = False
        self._back_ns: int | None = None
        self._outstanding: dict[int, int] = {}
        self._answered = trio.Event()
        self._last_error: str | None = None

    @property
    def active(self) -> bool:
        """Whether there is anything to watch."""
        return self._target is not None

    def follow(self, phases: MigrationPhases) -> None:
        """Attribute requests to the phases of this migration from now on."""
        self._phases = phases

    async def wait_before(self, seconds: float) -> None:
        """Wait until the service was watched for so long before its migration."""
        if self._target is None:
            return
        with trio.move_on_after(seconds):
            await self._opened.wait()
        if self._recorder is not None:
            await trio.sleep_until(self._begun_s + seconds)

    async def finish(self, report: Report) -> None:
        """Watch a little longer after a success, then put ``service`` into the report."""
        if self._target is None:
            return
        if self._recorder is None:
            reason = self._last_error or "its name was not resolved in time"
            self._warn(f"cannot probe the service at {self._target}: {reason}")
            return
        completed = report.status == "completed"
        if completed:
            await trio.sleep(AFTER_S)
        self._look()
        self._stop_sending.cancel()
        end_ns = time.monotonic_ns()
        with trio.move_on_after(LAST_ANSWERS_S):
            while any(sent_ns > end_ns - NS_PER_S for sent_ns in self._outstanding.values()):
                await self._answered.wait()
        for sent_ns in self._outstanding.values():
            self._recorder.lost(sent_ns)
        if self._stopped_ns is not None and not self._after_marked and self._back_ns:
            # Nobody tells when it ran again: it did when it first answered a newer request.
            self._recorder.mark("after", self._back_ns)
        if not self._recorder.answered:
            reason = self._last_error or "nothing came back"
            self._warn(f"no answer from the probed service at {self._target}: {reason}")
            return
        report.service = self._recorder.finish(end_ns)
        if completed and self._back_ns is None and self._stopped_ns is not None:
            self._warn(
                f"the probed service at {self._target} has not answered since the switchover"
            )

    # --- asking ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Ask and listen until cancelled."""
        assert self._target is not None
        try:
            sock = await _connect(self._target)
        except (OSError, UnicodeError) as error:  # the latter for names that IDNA refuses
            self._last_error = getattr(error, "strerror", None) or str(error)
            self._opened.set()
            return
        with trio.socket.from_stdlib_socket(sock) as listener:
            self._recorder = ServiceRecorder(time.monotonic_ns())
            self._begun_s = trio.current_time()
            self._opened.set()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen, listener)
                await self._ask(sock)

    async def _ask(self, sock: socket.socket) -> None:
        assert self._target is not None
        period_ns = NS_PER_S // self._target.rate_per_s
        number, due_ns = 0, time.monotonic_ns()
        with self._stop_sending:
            while True:
                self._look()
                now_ns = time.monotonic_ns()
                due_ns = max(due_ns, now_ns - MOST_BEHIND_NS)
                while due_ns <= now_ns:
                    self._ask_once(sock, number)
                    number += 1
                    due_ns += period_ns
                self._give_up_old(now_ns)
                await trio.sleep((due_ns - now_ns) / NS_PER_S)

    def _ask_once(self, sock: socket.socket, number: int) -> None:
        """Send without waiting: an open loop. What the host cannot send is a loss, too."""
        self._outstanding[number] = time.monotonic_ns()
        try:
            sock.send(DATAGRAM.pack(MAGIC, self._mark, number))
        except OSError as error:
            # "Port unreachable", the answer to an earlier request, arrives here, too.
            self._last_error = error.strerror

    def _give_up_old(self, now_ns: int) -> None:
        assert self._recorder is not None
        oldest_ns = now_ns - int(LOST_S * NS_PER_S)
        while self._outstanding:
            number, sent_ns = next(iter(self._outstanding.items()))
            if sent_ns > oldest_ns:
                return
            del self._outstanding[number]
            self._recorder.lost(sent_ns)

    # --- listening ------------------------------------------------------------------------------

    async def _listen(self, sock: trio.socket.SocketType) -> None:
        while True:
            try:
                data, beside, _, _ = await sock.recvmsg(DATAGRAM.size + 1, 128)
            except OSError as error:
                self._last_error = error.strerror
                continue
            self._take_answer(data, _arrived_ns(beside))

    def _take_answer(self, data: bytes, arrived_ns: int) -> None:
        """Count an answer to a request of ours that is still waited for; anything can come."""
        if len(data) != DATAGRAM.size:
            return
        magic, mark, number = DATAGRAM.unpack(data)
        if (magic, mark) != (MAGIC, self._mark) or number not in self._outstanding:
            return
        assert self._recorder is not None
        sent_ns = self._outstanding.pop(number)
        arrived_ns = max(arrived_ns, sent_ns)
        self._recorder.completed(sent_ns, arrived_ns)
        if self._back_ns is None and self._stopped_ns and sent_ns > self._stopped_ns:
            self._back_ns = arrived_ns
        self._answered.set()
        self._answered = trio.Event()

    # --- phases ---------------------------------------------------------------------------------

    def _look(self) -> None:
        """Mark the phases that began since the last look."""
        phases, recorder = self._phases, self._recorder
        if phases is None or recorder is None or self._after_marked:
            return
        stopped_ns = phases.stopped_ns()
        if stopped_ns is None and self._stopped_ns is not None:  # back to pre-copy
            self._stopped_ns = self._back_ns = None
            recorder.mark(max(self._rounds_marked - 1, 0), time.monotonic_ns())
        for counts in phases.ledger.rounds[self._rounds_marked :]:
            self._rounds_marked += 1
            if stopped_ns is None or counts.started_ns < stopped_ns:
                recorder.mark(counts.round_no, counts.started_ns)
        if stopped_ns is not None and self._stopped_ns is None:
            self._stopped_ns = stopped_ns
            recorder.mark("downtime", stopped_ns)
        running_ns = phases.running_ns()
        if stopped_ns is not None and running_ns is not None:
            recorder.mark("after", running_ns)
            self._after_marked = True


@asynccontextmanager
async def open_probe(
    target: ProbeTarget | None, warn: Callable[[str], None]
) -> AsyncIterator[Probe]:
    """Watch a service during the block.

    Args:
        target: The service, or ``None`` for a probe that does nothing.
        warn: Is told what went wrong.
    """
    probe = Probe(target, warn)
    async with trio.open_nursery() as nursery:
        if target is not None:
            nursery.start_soon(probe.run)
        yield probe
        nursery.cancel_scope.cancel()


async def _connect(target: ProbeTarget) -> socket.socket:
    """Open a socket that never blocks and takes datagrams from the service only.

    Raises:
        OSError: The name is not known, or there is no route.
    """
    found = await trio.socket.getaddrinfo(
        target.address.host, target.address.port, type=socket.SOCK_DGRAM
    )
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        sock.connect(address)  # sends nothing, so it does not wait
    except BaseException:
        sock.close()
        raise
    return sock


def _arrived_ns(beside: list[tuple[int, int, bytes]]) -> int:
    """Return the monotonic time of arrival, from the kernel's time stamp if there is one."""
    now_ns = time.monotonic_ns()
    for level, kind, stamp in beside:
        if (level, kind) == (socket.SOL_SOCKET, _SO_TIMESTAMPNS) and len(stamp) == 16:
            seconds, nanoseconds = _TIMESPEC.unpack(stamp)
            waited_ns: int = time.time_ns() - (seconds * NS_PER_S + nanoseconds)
            # The realtime clock may have been set meanwhile.
            return now_ns - min(max(waited_ns, 0), NS_PER_S)
    return now_ns
