"""TLS on a connection of the link: the handshake, and a connection for tasks, in large pieces.

OpenSSL works on memory here (two ``MemoryBIO``), never on the socket: a piece of the gather list is
encrypted at once and sent with one call, and ciphertext is received as the kernel has it and
decrypted into the caller's memory. That takes 0.3 ms a MiB and end, most of it AES. Threads that
have a connection for themselves go on with ``tls_channel``.
"""

import errno
import socket
import ssl
from collections.abc import Iterable
from typing import Any, Final, cast

import trio

from migrate.errors import PeerLostError, TlsError
from migrate.transport.channels import (
    LINK_NOTSENT_BYTES,
    TCP_NOTSENT_LOWAT,
    Buffer,
    LinkSocket,
    reason,
)
from migrate.transport.tls_channel import MAX_RECORD_BYTES, TlsChannel, first_bytes
from migrate.transport.tls_texts import (
    NAME_MISMATCH,
    alert_name,
    reason_words,
    refusal_words,
    verification_words,
)

RECEIVE_BYTES: Final = 256 * 1024
"""Most ciphertext that is taken from the kernel at once."""

MAX_PIECE_BYTES: Final = 512 * 1024
"""Most bytes that are encrypted at once: they all go out before anything else can."""

MAX_HANDSHAKE_BYTES: Final = 256 * 1024
"""What a peer may send before it is admitted; certificate chains take some KiB."""

ALERT_S: Final = 1.0
"""How long a peer whose handshake failed may take to hear why."""


def looks_like_tls(start: bytes) -> bool:
    """Whether a connection that begins so is TLS: a handshake's record, or an alert's."""
    return start[:1] in {b"\x16", b"\x15"} and start[1:2] == b"\x03"


class TlsSocket:
    """A connection with TLS, once ``handshake`` has returned; see ``LinkSocket``.

    One task may send, another receive. A cancelled ``sendmsg`` must be repeated with the same
    bytes, as ``Link`` does: they may be encrypted and partly sent already.

    The end of the connection is not signed with ``close_notify``: the link's BYE says what the
    last message is, and whoever cuts a connection can cut that as well.
    """

    def __init__(
        self,
        sock: LinkSocket,
        context: ssl.SSLContext,
        peer: str,
        *,
        hostname: str | None = None,
        received: bytes = b"",
    ) -> None:
        """Prepare a handshake.

        Args:
            sock: The connection below; ours from now on.
            context: As ``tls_credentials`` makes them.
            peer: The other end, for error texts.
            hostname: Whose certificate a client wants to see; None makes us the server.
            received: What was already read from the connection.
        """
        self._sock = sock
        self._peer = peer
        self._hostname = hostname
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=hostname is None,
            server_hostname=hostname,
        )
        self._start = bytes(received[:2])
        self._incoming.write(received)
        self._buffer = memoryview(bytearray(MAX_RECORD_BYTES))
        self._piece_bytes = LINK_NOTSENT_BYTES
        self._unsent = memoryview(b"")
        self._encrypted_bytes = 0
        self._failure: OSError | TlsError | None = None
        self._ended = False

    # --- the handshake ----------------------------------------------------------------------------

    async def handshake(self) -> None:
        """Shake hands; the caller sets the deadline.

        A client returns before the server has looked at its certificate, as TLS 1.3 is.

        Raises:
            TlsError: The peer does not speak TLS, does not take our certificate, or has none that
                we take.
            PeerLostError: The connection broke.
        """
        failure = None
        try:
            await self._shake_hands()
        except ssl.SSLError as error:
            failure = error
        except OSError as error:
            raise PeerLostError(
                f"lost the connection to {self._peer} in the TLS handshake: {reason(error)}"
            ) from error
        if failure is not None:
            await self._say_alert()
            raise TlsError(self._explain(failure)) from failure
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))

    async def _shake_hands(self) -> None:
        allowed = MAX_HANDSHAKE_BYTES
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._flush()
            allowed -= (count := await self._receive())
            if not count:
                raise PeerLostError(f"{self._peer} closed the connection in the TLS handshake")
            if allowed < 0:
                raise TlsError(f"{self._peer} sent too much before its TLS handshake was done")
        await self._flush()

    async def _say_alert(self) -> None:
        """Let the peer hear why it failed; a close with bytes unread would overtake that."""
        with trio.move_on_after(ALERT_S):
            try:
                await self._flush()
                self._sock.shutdown(socket.SHUT_WR)
                allowed = MAX_HANDSHAKE_BYTES
                while allowed > 0 and (count := await self._sock.recv_into(self._buffer)):
                    allowed -= count
            except OSError:
                return

    def _explain(self, error: ssl.SSLError) -> str:
        peer = self._peer
        if not looks_like_tls(self._start):
            return f"{peer} does not speak TLS: give both commands --tls-dir, or neither"
        if isinstance(error, ssl.SSLCertVerificationError):
            if error.verify_code in NAME_MISMATCH:
                return (
                    f"the certificate of {peer} is not for '{self._hostname}': use a name that "
                    "it has, or say which with --tls-hostname"
                )
            return f"the certificate of {peer} {verification_words(error)}"
        if error.reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
            return f"{peer} showed no certificate"
        alert = alert_name(error)
        if why := refusal_words(alert):
            return f"{peer} did not take our certificate: {why}"
        if alert == "PROTOCOL_VERSION" or error.reason == "UNSUPPORTED_PROTOCOL":
            return f"{peer} does not speak TLS 1.3"
        return f"the TLS handshake with {peer} failed: {reason_words(error)}"

    def certificate_names(self) -> list[str]:
        """Names of the peer's certificate, which was verified: its CN and its alternative names."""
        found: dict[str, Any] = self._tls.getpeercert() or {}
        subject = [pair for group in found.get("subject", ()) for pair in group]
        names = [value for key, value in subject if key == "commonName"]
        others = found.get("subjectAltName", ())
        return names + [value for key, value in others if key in {"DNS", "IP Address"}]

    # --- LinkSocket -------------------------------------------------------------------------------

    async def sendmsg(
        self,
        buffers: Iterable[memoryview],
        ancdata: Iterable[tuple[int, int, Buffer]] = (),
        flags: int = 0,
        /,
    ) -> int:
        """Send some of the buffers in order; returns how many bytes."""
        if not self._encrypted_bytes:
            piece = first_bytes(buffers, self._piece_bytes)
            try:
                self._encrypted_bytes = self._tls.write(piece)
            except ssl.SSLError as error:
                raise OSError(errno.EPIPE, f"TLS: {reason_words(error)}") from error
        await self._flush()
        sent, self._encrypted_bytes = self._encrypted_bytes, 0
        return sent

    async def _flush(self) -> None:
        """Send all ciphertext; a cancelled call leaves the rest for the next."""
        while True:
            while self._unsent:
                sent = await self._sock.sendmsg([self._unsent], [], socket.MSG_DONTWAIT)
                self._unsent = self._unsent[sent:]
            if not self._outgoing.pending:
                return
            self._unsent = memoryview(self._outgoing.read())

    async def recv_into(self, buffer: bytearray | memoryview, /) -> int:
        """Receive at least one byte; returns how many, 0 at the end of the stream.

        Raises:
            OSError: The connection broke, or what arrived is not what the peer sent.
            TlsError: The server does not take our certificate, which a client hears only here.
        """
        view = memoryview(buffer).cast("B")
        await trio.lowlevel.checkpoint_if_cancelled()
        while not (count := self._decrypt(view)):
            if self._failure is not None:
                raise self._failure
            self._ended = self._ended or not await self._receive()
            if self._ended:
                return 0
        return count

    def _decrypt(self, view: memoryview) -> int:
        """Decrypt what has arrived and fits; a failure behind it is for the next call."""
        filled = 0
        try:
            while filled < len(view) and not (self._ended or self._failure):
                # typeshed knows only the form that returns bytes
                count = cast(int, self._tls.read(len(view) - filled, view[filled:]))
                self._ended = not count
                filled += count
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            if refusal_words(alert_name(error)):
                self._failure = TlsError(self._explain(error))
            else:
                self._failure = OSError(errno.EBADMSG, f"TLS: {reason_words(error)}")
        return filled

    async def _receive(self) -> int:
        count = await self._sock.recv_into(self._buffer)
        if len(self._start) < 2:
            self._start += bytes(self._buffer[: min(count, 2)])
        self._incoming.write(self._buffer[:count])
        return count

    def for_threads(self) -> TlsChannel | None:
        """Hand the connection over to threads; None where it is none of the kernel's.

        After this only the channel may be used.
        """
        if not isinstance(self._sock, trio.socket.SocketType):
            return None
        below = socket.socket(fileno=self._sock.detach())
        return TlsChannel(below, self._tls, self._incoming, self._outgoing)

    def setsockopt(self, level: int, option: int, value: int, /) -> None:
        """Tune the TCP connection below, in its own bytes."""
        if (level, option) == (socket.SOL_SOCKET, socket.SO_RCVLOWAT):
            # The end of a record that we hold is all that may be missing of what is waited for.
            value = max(1, value - MAX_RECORD_BYTES)
        elif (level, option) == (socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT):
            self._piece_bytes = min(max(value, LINK_NOTSENT_BYTES), MAX_PIECE_BYTES)
        self._sock.setsockopt(level, option, value)

    def shutdown(self, flag: int, /) -> None:
        """End our direction."""
        self._sock.shutdown(flag)

    def close(self) -> None:
        """Close both directions."""
        self._sock.close()
