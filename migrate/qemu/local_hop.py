"""The hop between a QEMU on this host and us: its migration stream on a socket.

``IncomingHop`` is the source side (QEMU connects to us and sends its guest), ``OutgoingHop`` the
destination side (we connect to a QEMU that waits with ``-incoming``). Both carry QEMU's return
path in the other direction.
"""

import contextlib
import os
import socket
import struct
from collections.abc import Iterable, Iterator

import trio

from migrate.errors import QemuStreamBrokenError
from migrate.transport.channels import Buffer, reason, send_all, widen_send_buffer
from proto.errors import QemuStreamError
from proto.guest_events import NEED_DATA, GuestEvent, run_pages
from proto.qemu.multifd_writer import Interval
from proto.qemu.return_path import ReturnPathMessage, ReturnPathReader
from proto.qemu.stream_reader import StreamReader

RETURN_PATH_READ_BYTES = 4096

PIECE_BYTES = 256 * 1024
"""One receive: small enough that the parser finds the bytes in the processor's cache."""

PIECE_TIMEOUT = struct.pack("ll", 0, 2000)
"""Longest wait for a full piece, struct timeval: 2 ms, once, at the end of a burst."""

LINGER_NOT = struct.pack("ii", 1, 0)


@contextlib.contextmanager
def stream_errors() -> Iterator[None]:
    """Tell what a source QEMU sent wrongly, or stopped sending, as its stream's end."""
    try:
        yield
    except QemuStreamError as error:
        raise QemuStreamBrokenError(f"the source QEMU's stream: {error}") from error
    except OSError as error:
        raise QemuStreamBrokenError(
            f"the source QEMU's stream broke: {reason(error)}"
        ) from error


async def brings(sock: trio.socket.SocketType, magic: bytes) -> bool:
    """Whether the peer's first bytes are these; they are left to be read."""
    while True:
        data = await sock.recv(len(magic), socket.MSG_PEEK)
        if len(data) == len(magic) or not magic.startswith(data) or not data:
            return data == magic
        await trio.sleep(0.01)  # the rest is on its way; peeking again would not wait for it


class IncomingHop:
    """The source QEMU's stream as events.

    Attributes:
        bytes_received: Stream bytes read so far.
    """

    def __init__(
        self, sock: trio.socket.SocketType, reader: StreamReader | None = None
    ) -> None:
        self._sock = sock
        self._reader = reader or StreamReader()
        self._reading = trio.CapacityLimiter(1)
        self._blocking = socket.socket(fileno=os.dup(sock.fileno()))
        # The thread's receive waits for a full piece, but not longer than a guest may be kept
        # waiting; the flag is the open socket's, so our own calls here pass MSG_DONTWAIT.
        self._blocking.setblocking(True)
        self._blocking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, PIECE_TIMEOUT)
        self.bytes_received = 0

    async def next_events(self, burst_bytes: int) -> list[GuestEvent]:
        """Events of up to ``burst_bytes`` of the stream; at least one, in order.

        Receiving and parsing run in a thread: the kernel's copies and ours then cost the rest of
        the engine nothing, and a thread that may wait for a full piece saves a wake-up per 30 KB.

        Raises:
            QemuStreamBrokenError: QEMU closed the stream early, or sent what cannot be carried.
        """
        events: list[GuestEvent] = []
        while not events:
            await trio.lowlevel.wait_readable(self._sock)
            with stream_errors():
                events = await trio.to_thread.run_sync(
                    self._drain, burst_bytes, limiter=self._reading
                )
        return events

    def _drain(self, burst_bytes: int) -> list[GuestEvent]:
        """Receive and parse up to ``burst_bytes``; runs in a thread, one at a time."""
        events: list[GuestEvent] = []
        self._reader.set_run_pages(run_pages(burst_bytes))
        for start in range(0, burst_bytes, PIECE_BYTES):
            buffer = self._reader.get_buffer()[: min(PIECE_BYTES, burst_bytes - start)]
            try:
                count = self._blocking.recv_into(buffer, len(buffer), socket.MSG_WAITALL)
            except BlockingIOError:
                break
            self.bytes_received += count
            if count:
                self._reader.buffer_updated(count)
            else:
                self._reader.feed_eof()
            while (event := self._reader.next_event()) is not NEED_DATA:
                events.append(event)
            if count < len(buffer) or self._reader.at_sync:
                break
        return events

    def is_closed_by_qemu(self) -> bool:
        """Whether QEMU has closed its end by now, without waiting."""
        try:
            return not self._blocking.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    async def wait_eof(self) -> None:
        """Return when QEMU closed its end; bytes that still come are dropped."""
        scratch = bytearray(65536)
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            try:
                if not self._blocking.recv_into(scratch, 0, socket.MSG_DONTWAIT):
                    return
            except BlockingIOError:
                continue  # woken for nothing
            except OSError:
                return

    async def answer(self, message: bytes) -> None:
        """Send a return path message to the source QEMU.

        Raises:
            QemuStreamBrokenError: QEMU no longer listens.
        """
        try:
            await send_all(self._sock, [message])
        except OSError as error:
            raise QemuStreamBrokenError(
                f"the source QEMU closed its return path: {reason(error)}"
            ) from error

    def abort(self) -> None:
        """Make a pending ``next_events`` fail: the guest is gone."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    async def call_off(self) -> None:
        """Close the stream so that a QEMU which only writes notices at once, also over TCP."""
        self._reset_main()
        await trio.lowlevel.checkpoint()

    def _reset_main(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
        IncomingHop.close(self)

    def close(self) -> None:
        """Close the stream; before SHUT this makes the source QEMU resume its guest."""
        self._blocking.close()
        self._sock.close()


class OutgoingHop:
    """The stream into a destination QEMU, and its return path."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock
        widen_send_buffer(sock)
        self._return_path = ReturnPathReader()

    async def send(self, buffers: Iterable[Buffer]) -> None:
        """Write stream bytes.

        Raises:
            QemuStreamBrokenError: The destination QEMU closed the stream: it failed to load.
        """
        try:
            await send_all(self._sock, buffers)
        except OSError as error:
            raise self._broken(error) from error

    def _broken(self, error: OSError) -> QemuStreamBrokenError:
        return QemuStreamBrokenError(f"the destination QEMU stopped loading: {reason(error)}")

    async def send_intervals(self, intervals: Iterable[Interval]) -> None:
        """Write what a writer gave out; raises as ``send``."""
        await self.send([buffer for interval in intervals for buffer in interval.main])

    def expect_end(self) -> None:
        """Say that the QEMU may now close its connections: it is about to get the end."""

    async def next_messages(self) -> list[ReturnPathMessage]:
        """Return path messages as they come; empty when the destination QEMU closed the socket.

        Raises:
            QemuStreamBrokenError: What came back is no return path.
        """
        while True:
            try:
                data = await self._sock.recv(RETURN_PATH_READ_BYTES)
            except (OSError, trio.ClosedResourceError):  # the latter: we closed it ourselves
                return []
            if not data:
                return []
            try:
                messages = self._return_path.feed(data)
            except QemuStreamError as error:
                raise QemuStreamBrokenError(f"the destination QEMU: {error}") from error
            if messages:
                return messages

    def abort(self) -> None:
        """Make whoever reads or writes the stream see that it is at its end."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the stream."""
        self._sock.close()
