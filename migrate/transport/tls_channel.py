"""TLS for threads: what a link's stream uses of a blocking socket, one thread for each direction.

OpenSSL's object serves one call at a time, so a lock is held while bytes are encrypted or
decrypted, never while anybody waits for the network. Both let go of the interpreter meanwhile.
"""

import errno
import socket
import ssl
import threading
from collections.abc import Iterable
from typing import Final, cast

from migrate.transport.tls_texts import reason_words

RECEIVE_BYTES: Final = 256 * 1024
"""Most ciphertext that is taken from the kernel at once."""

MAX_PIECE_BYTES: Final = 128 * 1024
"""Most bytes that are encrypted at once: they stay in the processor's cache until they are sent."""

MAX_RECORD_BYTES: Final = 16 * 1024 + 256 + 5
"""Longest record. So much ciphertext OpenSSL may hold and not count, as the beginning of one:
whoever waits for the end of a payload must not wait for these bytes again."""

RECORD_BYTES: Final = 16 * 1024
"""What a record carries at most."""

LARGE_BYTES: Final = 4 * RECORD_BYTES
"""Buffers that are encrypted where they are."""

WAIT_BYTES: Final = 32 * 1024
"""So much ciphertext, if it is known to come, is waited for as a whole."""


class TlsChannel:
    """A connection whose hands were shaken; raises ``OSError`` as a socket does.

    A ``sendmsg`` that raised ``BlockingIOError`` must be repeated with the same first bytes: they
    are encrypted, and partly sent, already.
    """

    def __init__(
        self,
        sock: socket.socket,
        tls: ssl.SSLObject,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
    ) -> None:
        """Take over.

        Args:
            sock: The TCP connection below.
            tls: Its TLS.
            incoming: Where that finds ciphertext.
            outgoing: Where that leaves ciphertext.
        """
        self._sock = sock
        self._tls = tls
        self._incoming, self._outgoing = incoming, outgoing
        self._lock = threading.Lock()
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._unsent = memoryview(b"")
        self._encrypted_bytes = 0
        self._failure: OSError | None = None
        self._ended = False

    def recv_into(self, buffer: bytearray | memoryview, nbytes: int = 0, flags: int = 0) -> int:
        """Receive, as ``socket.recv_into``; knows ``MSG_WAITALL`` and ``MSG_DONTWAIT``."""
        view = memoryview(buffer).cast("B")[: nbytes or None]
        filled = 0
        while True:
            filled += self._decrypt(view[filled:])
            if filled and (filled == len(view) or not flags & socket.MSG_WAITALL):
                return filled
            if filled == 0 and self._failure is not None:
                raise self._failure
            if self._ended or self._failure is not None:
                return filled
            try:
                self._receive(len(view) - filled, flags)
            except BlockingIOError:
                if not filled:
                    raise
                return filled

    def _decrypt(self, view: memoryview) -> int:
        filled = 0
        try:
            with self._lock:
                while filled < len(view) and not (self._ended or self._failure):
                    # typeshed knows only the form that returns bytes
                    count = cast(int, self._tls.read(len(view) - filled, view[filled:]))
                    self._ended = not count
                    filled += count
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self._failure = OSError(errno.EBADMSG, f"TLS: {reason_words(error)}")
        return filled

    def _receive(self, missing_bytes: int, flags: int) -> None:
        """Receive ciphertext; of a payload that is under way, much at once."""
        wanted = min(missing_bytes - self._incoming.pending - MAX_RECORD_BYTES, RECEIVE_BYTES)
        if flags & socket.MSG_WAITALL and wanted >= WAIT_BYTES:
            count = self._sock.recv_into(self._buffer, wanted, socket.MSG_WAITALL)
        else:
            count = self._sock.recv_into(self._buffer, 0, flags & ~socket.MSG_WAITALL)
        self._ended = not count
        with self._lock:
            self._incoming.write(self._buffer[:count])

    def sendmsg(
        self,
        buffers: Iterable[memoryview],
        ancdata: Iterable[tuple[int, int, bytes]] = (),
        flags: int = 0,
    ) -> int:
        """Send some of the buffers, as ``socket.sendmsg``."""
        if not self._encrypted_bytes:
            piece = first_bytes(buffers, MAX_PIECE_BYTES)
            try:
                with self._lock:
                    self._encrypted_bytes = self._tls.write(piece)
            except ssl.SSLError as error:
                raise OSError(errno.EPIPE, f"TLS: {reason_words(error)}") from error
        while self._unsent or self._outgoing.pending:
            if not self._unsent:
                with self._lock:
                    self._unsent = memoryview(self._outgoing.read())
            self._unsent = self._unsent[self._sock.send(self._unsent, flags) :]
        sent, self._encrypted_bytes = self._encrypted_bytes, 0
        return sent

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        """See ``socket.getsockopt``."""
        return self._sock.getsockopt(level, option, size)

    def setsockopt(self, level: int, option: int, value: int | bytes) -> None:
        """Tune the TCP connection below."""
        self._sock.setsockopt(level, option, value)

    def setblocking(self, flag: bool) -> None:
        """As ``socket.setblocking``."""
        self._sock.setblocking(flag)

    def fileno(self) -> int:
        """The TCP connection's."""
        return self._sock.fileno()

    def shutdown(self, how: int) -> None:
        """End a direction; whoever waits in it wakes up."""
        self._sock.shutdown(how)

    def close(self) -> None:
        """Close both directions."""
        self._sock.close()


def first_bytes(buffers: Iterable[memoryview], most: int) -> memoryview | bytes:
    """The first bytes of a gather list: small buffers joined to records, large ones as they are.

    A record a buffer would cost more than the copy; a copy of a payload costs a third of what
    encrypting it does.
    """
    parts: list[memoryview] = []
    length = 0
    for buffer in buffers:
        part = buffer.cast("B")
        if len(part) >= LARGE_BYTES:
            if not parts:
                return part[:most]
            most = min(most, length + -length % RECORD_BYTES)
        part = part[: most - length]
        parts.append(part)
        length += len(part)
        if length >= most:
            break
    return parts[0] if len(parts) == 1 else b"".join(parts)
