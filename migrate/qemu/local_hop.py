"""The hop between a QEMU on this host and us: its migration stream on a socket.

``IncomingHop`` is the source side (QEMU connects to us and sends its guest), ``OutgoingHop`` the
destination side (we connect to a QEMU that waits with ``-incoming``). Both carry QEMU's return
path in the other direction.
"""

import contextlib
import socket
from collections.abc import Iterable

import trio

from proto.guest_events import NEED_DATA, End, GuestEvent
from proto.qemu.return_path import ReturnPathMessage, ReturnPathReader
from proto.qemu.stream_reader import StreamReader

from migrate.errors import QemuStreamBrokenError
from migrate.transport.channels import Buffer, reason, send_all
from proto.errors import QemuStreamError

RETURN_PATH_READ_BYTES = 4096


class IncomingHop:
    """The source QEMU's stream as events.

    Attributes:
        bytes_received: Stream bytes read so far.
    """

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock
        self._reader = StreamReader()
        self._ended = False
        self.bytes_received = 0

    async def next_events(self) -> list[GuestEvent]:
        """Events that one receive brought; at least one, in order.

        Raises:
            QemuStreamBrokenError: QEMU closed the stream early, or sent what cannot be carried.
        """
        events: list[GuestEvent] = []
        try:
            while not events:
                while (event := self._reader.next_event()) is not NEED_DATA:
                    events.append(event)
                if not events:
                    await self._receive()
        except QemuStreamError as error:
            raise QemuStreamBrokenError(f"the source QEMU's stream: {error}") from error
        self._ended = isinstance(events[-1], End)
        return events

    async def _receive(self) -> None:
        try:
            count = await self._sock.recv_into(self._reader.get_buffer())
        except OSError as error:
            raise QemuStreamBrokenError(
                f"the source QEMU's stream broke: {reason(error)}"
            ) from error
        self.bytes_received += count
        if count:
            self._reader.buffer_updated(count)
        else:
            self._reader.feed_eof()

    async def wait_eof(self) -> None:
        """Return when QEMU closed its end; bytes that still come are dropped."""
        scratch = bytearray(65536)
        try:
            while await self._sock.recv_into(scratch):
                pass
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

    def close(self) -> None:
        """Close the stream; before SHUT this makes the source QEMU resume its guest."""
        self._sock.close()


class OutgoingHop:
    """The stream into a destination QEMU, and its return path."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock
        self._return_path = ReturnPathReader()

    async def send(self, buffers: Iterable[Buffer]) -> None:
        """Write stream bytes.

        Raises:
            QemuStreamBrokenError: The destination QEMU closed the stream: it failed to load.
        """
        try:
            await send_all(self._sock, buffers)
        except OSError as error:
            raise QemuStreamBrokenError(
                f"the destination QEMU stopped loading: {reason(error)}"
            ) from error

    async def next_messages(self) -> list[ReturnPathMessage]:
        """Return path messages as they come; empty when the destination QEMU closed the socket.

        Raises:
            QemuStreamBrokenError: What came back is no return path.
        """
        while True:
            try:
                data = await self._sock.recv(RETURN_PATH_READ_BYTES)
            except OSError:
                return []
            if not data:
                return []
            try:
                messages = self._return_path.feed(data)
            except QemuStreamError as error:
                raise QemuStreamBrokenError(f"the destination QEMU: {error}") from error
            if messages:
                return messages

    def close(self) -> None:
        """Close the stream."""
        self._sock.close()
