"""A QMP monitor of a QEMU on this host, spoken to over its unix socket.

One reader task takes everything the monitor sends and hands replies to the task that asked
and events to whoever listens. This module knows commands, ids and events; what the commands
and their results mean stands in ``queries.py``.

A socket monitor serves one client: a second connection is accepted by the kernel but never
greeted. Commands run in order, except the few that QEMU runs out of band, beside its main lock:
these are the way out when a stopped source blocks on a migration stream that nobody reads.
"""

import errno
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import trio

from migrate.errors import GuestError, QmpCommandError, QmpConnectError, QmpInterruptedError
from proto.errors import LocalProtocolError, QmpProtocolError
from proto.guest_events import NeedData
from proto.qemu.qmp import (
    ErrorReply,
    Event,
    Greeting,
    JsonValue,
    QmpMessage,
    QmpReader,
    Reply,
    encode_command,
)

logger = logging.getLogger(__name__)

OOB_COMMANDS: Final = frozenset({"yank", "query-yank", "migrate-recover", "migrate-pause"})
"""All that QEMU 7.2 and 10.0 run out of band."""

MAX_OUTSTANDING: Final = 6
"""In-band commands sent and not yet answered. QEMU stops reading a monitor with 8 of them
queued (tried: a yank behind 7 gets through, behind 8 it does not), and the out-of-band ones are
to get us out of just that situation."""

LISTENER_EVENTS: Final = 1024
"""Events one listener holds unread. A migration of an hour emits a few hundred."""

_READ_BYTES: Final = 65536
_RETRY_CONNECT_S: Final = 0.05


class EventListener:
    """Events by name, in order, from the moment it was opened; from ``QmpClient.listen``.

    Up to ``LISTENER_EVENTS`` wait unread. If more come, the ones held are still delivered, then
    ``next`` raises: an event is never lost without an error.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        self._send, self._receive = trio.open_memory_channel[Event](LISTENER_EVENTS)
        self._overflowed = False

    async def next(self) -> Event:
        """Wait for the next event; nothing is lost if this is cancelled.

        Raises:
            QmpInterruptedError: The monitor closed, and every event before that was taken.
            GuestError: More than ``LISTENER_EVENTS`` events were left unread.
        """
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            raise self._end_error() from None

    def next_nowait(self) -> Event | None:
        """Take the next event if there is one; raises as ``next``."""
        try:
            return self._receive.receive_nowait()
        except trio.WouldBlock:
            return None
        except trio.EndOfChannel:
            raise self._end_error() from None

    def _end_error(self) -> GuestError:
        if self._overflowed:
            return GuestError(f"more than {LISTENER_EVENTS} QMP events were left unread")
        return QmpInterruptedError("QMP monitor closed while waiting for an event")

    def deliver(self, event: Event) -> None:
        """Take an event from the reader task; drops those with other names."""
        if self.names and event.name not in self.names:
            return
        try:
            self._send.send_nowait(event)
        except trio.WouldBlock:
            self._overflowed = True
            self._send.close()
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            pass  # overflowed before, or about to be removed by its owner

    def close_input(self) -> None:
        """State that no event follows."""
        self._send.close()

    def close(self) -> None:
        """Drop what is unread."""
        self._send.close()
        self._receive.close()


class _Pending:
    """A command under way; stays known after its caller left, until its reply came."""

    def __init__(self, *, in_band: bool) -> None:
        self.in_band = in_band
        self.done = trio.Event()
        self.reply: Reply | ErrorReply | None = None


_PEERCRED: Final = struct.Struct("3i")
"""Linux's struct ucred: pid, uid, gid of the process that listens on the socket."""


class QmpClient:
    """A negotiated monitor; from ``open_qmp``. Several tasks may use it at once.

    Attributes:
        greeting: What QEMU said of itself.
        path: The monitor's socket.
        oob: Whether out-of-band commands were negotiated.
    """

    def __init__(self, path: Path, stream: trio.SocketStream, reader: QmpReader) -> None:
        self.path = path
        self.greeting = Greeting((0, 0, 0), "", frozenset())
        self.oob = False
        self._stream = stream
        credentials = stream.socket.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size
        )
        self._peer_pid: int = _PEERCRED.unpack(credentials)[0]
        self._reader = reader
        self._next_id = 1
        self._pending: dict[int, _Pending] = {}
        self._in_band_outstanding = 0
        self._slot_freed = trio.lowlevel.ParkingLot()
        # A task of its own writes, so that a cancelled caller cannot leave half a line behind.
        self._outbox, self._to_write = trio.open_memory_channel[bytes](MAX_OUTSTANDING)
        self._listeners: set[EventListener] = set()
        self._closed = trio.Event()
        self._closed_because = ""

    async def execute(self, name: str, /, **arguments: JsonValue) -> JsonValue:
        """Run a command and return its result, a parsed JSON value.

        If this is cancelled the command may still run; its reply is dropped and the client
        stays usable.

        Args:
            name: QMP command name.
            arguments: By QMP name (``**{"command-line": …}`` for names with dashes).

        Raises:
            QmpCommandError: QEMU refused or failed it.
            QmpInterruptedError: The monitor closed; whether the command ran is unknown.
        """
        self._check_open(name)
        while self._in_band_outstanding >= MAX_OUTSTANDING:
            await self._slot_freed.park()
            self._check_open(name)
        self._in_band_outstanding += 1
        return await self._run(name, arguments, in_band=True)

    async def execute_oob(self, name: str, /, **arguments: JsonValue) -> JsonValue:
        """Run one of ``OOB_COMMANDS`` beside QEMU's main lock; as ``execute`` otherwise.

        Raises:
            LocalProtocolError: The command cannot run out of band.
            GuestError: The monitor did not offer out-of-band execution.
        """
        if name not in OOB_COMMANDS:
            raise LocalProtocolError(f"'{name}' cannot run out of band")
        if not self.oob:
            raise GuestError(f"the monitor at {self.path} does not run commands out of band")
        self._check_open(name)
        return await self._run(name, arguments, in_band=False)

    @contextmanager
    def listen(self, *names: str) -> Iterator[EventListener]:
        """Collect events with these names (all events if none is given) until the block ends.

        Open it before the command that causes the event.
        """
        listener = EventListener(frozenset(names))
        if self._closed.is_set():
            listener.close_input()
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)
            listener.close()

    @property
    def peer_pid(self) -> int:
        """The process that opened the monitor: the QEMU itself, on this host."""
        return self._peer_pid

    @property
    def is_closed(self) -> bool:
        """Whether the monitor is gone, most often because QEMU exited."""
        return self._closed.is_set()

    async def wait_peer_dead(self) -> None:
        """Wait until the process that opened the monitor has ended, whatever the monitor does."""
        try:
            pidfd = os.pidfd_open(self._peer_pid)
        except ProcessLookupError:
            return
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)

    async def wait_closed(self) -> None:
        """Wait until QEMU closes the monitor, or it breaks."""
        await self._closed.wait()

    async def _run(
        self, name: str, arguments: dict[str, JsonValue], *, in_band: bool
    ) -> JsonValue:
        command_id = self._next_id
        self._next_id += 1
        pending = _Pending(in_band=in_band)
        self._pending[command_id] = pending
        try:
            line = encode_command(
                name, arguments, command_id=command_id, out_of_band=not in_band
            )
            await self._outbox.send(line)
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            raise self._interrupted(name) from None
        except BaseException:
            self._settle(command_id)  # never sent, so no reply will
            raise
        await pending.done.wait()
        if isinstance(pending.reply, ErrorReply):
            raise QmpCommandError(name, pending.reply.error_class, pending.reply.desc)
        if pending.reply is None:
            raise self._interrupted(name)
        return pending.reply.value

    def _settle(self, command_id: int) -> _Pending | None:
        pending = self._pending.pop(command_id, None)
        if pending is not None and pending.in_band:
            self._in_band_outstanding -= 1
            self._slot_freed.unpark()
        return pending

    def _check_open(self, name: str) -> None:
        if self._closed.is_set():
            raise self._interrupted(name)

    def _interrupted(self, name: str) -> QmpInterruptedError:
        return QmpInterruptedError(
            f"QMP monitor {self.path} closed during '{name}': {self._closed_because}"
        )

    async def negotiate(self) -> None:
        """Read the greeting and leave negotiation mode.

        Raises:
            QmpConnectError: Closed, or negotiation refused.
            QmpProtocolError: Not QMP.
        """
        greeting = await self._receive_message()
        if not isinstance(greeting, Greeting):  # the reader lets nothing else come first
            raise QmpConnectError(f"{self.path} closed the connection without a QMP greeting")
        self.greeting = greeting
        self.oob = "oob" in greeting.capabilities
        line = encode_command(
            "qmp_capabilities", {"enable": ["oob"]} if self.oob else {}, command_id=0
        )
        await self._stream.send_all(line)
        while isinstance(message := await self._receive_message(), Event):
            pass  # nobody can listen yet
        if not isinstance(message, Reply):
            reason = message.desc if isinstance(message, ErrorReply) else "connection closed"
            raise QmpConnectError(f"{self.path} refused QMP negotiation: {reason}")

    async def _receive_message(self) -> QmpMessage | None:
        while isinstance(message := self._reader.next_message(), NeedData):
            data = await self._stream.receive_some(_READ_BYTES)
            if not data:
                self._reader.feed_eof()
                return None
            self._reader.feed(data)
        return message

    async def read_forever(self) -> None:
        """Hand out what the monitor sends until it closes; the client's one reader task."""
        reason = "closed by us"
        try:
            while (message := await self._receive_message()) is not None:
                self._dispatch(message)
            reason = "end of file"
        except QmpProtocolError as error:
            reason = str(error)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            reason = str(error.__cause__ or error)
        finally:
            self.close(reason)

    async def write_forever(self) -> None:
        """Send the lines that callers queue; ends when the monitor is gone."""
        try:
            async for line in self._to_write:
                await self._stream.send_all(line)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            # The reader sees the end too, after what QEMU sent before it went.
            logger.debug("QMP monitor %s takes no more commands: %s", self.path, error)

    def _dispatch(self, message: QmpMessage) -> None:
        if isinstance(message, Event):
            logger.debug("QMP event %s %s", message.name, message.data)
            for listener in tuple(self._listeners):
                listener.deliver(message)
        elif isinstance(message, Reply | ErrorReply):
            pending = None if message.id is None else self._settle(message.id)
            if pending is None:
                raise QmpProtocolError("QMP reply", "an id under way", repr(message.id))
            pending.reply = message
            pending.done.set()
        else:
            raise QmpProtocolError("QMP", "one greeting", "a second one")

    def close(self, reason: str) -> None:
        """Close the socket and fail whatever waits for it; idempotent."""
        if self._closed.is_set():
            return
        self._closed_because = reason
        self._closed.set()
        self._stream.socket.close()
        self._outbox.close()
        self._to_write.close()
        for command_id in tuple(self._pending):
            if (pending := self._settle(command_id)) is not None:
                pending.done.set()
        self._slot_freed.unpark_all()
        for listener in self._listeners:
            listener.close_input()


@asynccontextmanager
async def open_qmp(path: Path, *, greeting_timeout_s: float = 5) -> AsyncIterator[QmpClient]:
    """Connect to a QMP socket and negotiate, out of band where offered; close at exit.

    Args:
        path: The monitor's unix socket.
        greeting_timeout_s: Seconds for connection and negotiation together.

    Raises:
        QmpConnectError: No such socket, nobody listens, not QMP, or no greeting in time
            (another client uses the monitor, or QEMU hangs).
    """
    client = await _connect(path, greeting_timeout_s)
    body_error: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.read_forever)
            nursery.start_soon(client.write_forever)
            # The tasks above raise nothing, so the body's own error is handed on as it is
            # instead of inside a group.
            try:
                yield client
            except Exception as error:
                body_error = error
            nursery.cancel_scope.cancel()
    finally:
        client.close("closed by us")
    if body_error is not None:
        raise body_error


async def _connect(path: Path, greeting_timeout_s: float) -> QmpClient:
    problem = "gave no QMP greeting: the monitor is in use by another client, or QEMU hangs"
    with trio.move_on_after(greeting_timeout_s):
        stream = await _connect_socket(path)
        client = QmpClient(path, stream, QmpReader())
        try:
            await client.negotiate()
        except QmpProtocolError as error:
            client.close("not QMP")
            raise QmpConnectError(f"{path} does not speak QMP: {error}") from error
        except trio.BrokenResourceError as error:
            client.close("broken")
            raise QmpConnectError(f"{path} closed the connection: {error}") from error
        except BaseException:
            client.close("not negotiated")
            raise
        return client
    raise QmpConnectError(f"{path} {problem} (waited {greeting_timeout_s:g} s)")


async def _connect_socket(path: Path) -> trio.SocketStream:
    """Connect; retry while the listener's queue is full, as it is while others wait."""
    while True:
        sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        try:
            await sock.connect(str(path))
            # A full queue answers EAGAIN, which looks like a connection in progress to trio:
            # only a socket with a peer is connected.
            sock.getpeername()
        except OSError as error:
            sock.close()
            if error.errno not in {errno.EAGAIN, errno.ENOTCONN}:
                reason = error.strerror or str(error)
                raise QmpConnectError(f"cannot connect to {path}: {reason}") from error
            await trio.sleep(_RETRY_CONNECT_S)
        except BaseException:
            sock.close()
            raise
        else:
            return trio.SocketStream(sock)
