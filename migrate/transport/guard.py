"""Who may take part in a link: TLS, a shared token, both, or nothing asked.

The guard stands between a connection and its first frame, at both ends and for every connection of
a migration. Whoever does not pass it has made the destination do arithmetic on a few hundred bytes.
"""

import contextlib
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Final

import trio

from migrate.errors import (
    MigrationError,
    PeerLostError,
    PeerProtocolError,
    TlsError,
    TokenError,
)
from migrate.link_security import LinkSecurity, is_loopback
from migrate.params import LinkAddress
from migrate.transport.channels import LinkSocket, reason, send_views
from migrate.transport.private_file import check_private
from migrate.transport.tls import MAX_HANDSHAKE_BYTES, TlsSocket, looks_like_tls
from migrate.transport.tls_credentials import load_credentials
from proto.errors import AdmissionError
from proto.limits import NONCE_BYTES, PROOF_BYTES
from proto.link.admission import (
    ADMISSION_MAGIC,
    ANSWER_BYTES,
    OPENING_BYTES,
    VERSION,
    Answer,
    Opening,
    Verdict,
    is_proof,
    prove,
)
from proto.link.dispatch import encode_message
from proto.link.frames import MAGIC, encode_frame
from proto.link.messages import Refused
from proto.link.state import Role

MIN_TOKEN_BYTES: Final = 32
"""128 random bits in hexadecimal: a shorter token may be one that somebody thought up."""

MAX_TOKEN_FILE_BYTES: Final = 4096

PART_S: Final = 1.0
"""How long an end that is sent away may take to hear why."""

_MAGIC_BYTES: Final = len(MAGIC)


class Guard:
    """What one end demands of every connection of its link."""

    def __init__(
        self, role: Role, security: LinkSecurity, random_bytes: Callable[[int], bytes]
    ) -> None:
        """Note what is asked; ``load`` reads the files.

        Args:
            role: Which end this is.
            security: What was asked for.
            random_bytes: Gives bytes that nobody can guess.
        """
        self._role = role
        self._security = security
        self._random_bytes = random_bytes
        self._context: ssl.SSLContext | None = None
        self._token: bytes | None = None

    def load(self) -> None:
        """Read certificates, keys and token.

        Raises:
            TlsError: They cannot be used.
            TokenError: The token cannot.
        """
        if self._security.tls_dir is not None:
            self._context = load_credentials(self._security.tls_dir, self._role)
        if self._security.token_file is not None:
            self._token = read_token(self._security.token_file)

    @property
    def _asks(self) -> bool:
        return self._context is not None or self._token is not None

    def exposure(self, host: str) -> str | None:
        """What a person should know who listens there; None if all is well."""
        if self._context is not None or is_loopback(host):
            return None
        sees = "whoever sees the link sees the guest's memory"
        if self._token is not None:
            return (
                f"listening without --tls-dir: the token is safe, but {sees} and can change it"
            )
        return (
            "listening without --tls-dir and --token-file: whoever reaches this port can send "
            f"a guest, and {sees}"
        )

    # --- the source -------------------------------------------------------------------------------

    async def enter(self, sock: LinkSocket, address: LinkAddress, peer: str) -> LinkSocket:
        """Source: have a connection admitted; returns what to use from now on.

        Args:
            sock: A connection on which nothing was said; closed if this fails.
            address: Where it leads.
            peer: The destination, for error texts.

        Raises:
            TlsError: One end does not take the other's certificate, or speaks no TLS.
            TokenError: The two ends have different tokens, or one has none.
            PeerLostError: The connection broke.
            PeerProtocolError: The other end does not speak this protocol.
        """
        if not self._asks:
            return sock
        try:
            if self._context is not None:
                hostname = self._security.tls_hostname or address.host.partition("%")[0]
                tls = TlsSocket(sock, self._context, peer, hostname=hostname)
                sock = tls
                await tls.handshake()
            await self._open(sock, peer)
        except BaseException:
            sock.close()
            raise
        return sock

    async def _open(self, sock: LinkSocket, peer: str) -> None:
        nonce = self._random_bytes(NONCE_BYTES)
        await _send(sock, peer, Opening(nonce, self._token is not None).encode())
        answer = await self._hear(sock, peer)
        if self._token is None:
            if answer.verdict is not Verdict.ADMITTED:
                raise _refused(answer, peer)
            return
        if answer.verdict is not Verdict.PROVE:
            raise _refused(answer, peer)
        nonces = nonce, answer.value
        await _send(sock, peer, prove(self._token, Role.SOURCE, *nonces))
        answer = await self._hear(sock, peer)
        if answer.verdict is not Verdict.ADMITTED:
            raise _refused(answer, peer)
        if not is_proof(answer.value, self._token, Role.DESTINATION, *nonces):
            raise TokenError(f"{peer} could not prove that it has the token of --token-file")

    async def _hear(self, sock: LinkSocket, peer: str) -> Answer:
        magic = await _receive(sock, peer, _MAGIC_BYTES)
        if magic == MAGIC:
            # It did not wait for us to open: nothing is asked there.
            raise TokenError(
                f"{peer} was started without --token-file: give it to both commands, or neither"
            )
        try:
            # What is none is not waited for.
            rest = ANSWER_BYTES - _MAGIC_BYTES if magic == ADMISSION_MAGIC else 0
            return Answer.decode(magic + await _receive(sock, peer, rest))
        except AdmissionError as error:
            raise PeerProtocolError(f"{peer} broke the admission: {error}") from error

    # --- the destination --------------------------------------------------------------------------

    async def admit(self, sock: LinkSocket, peer: str) -> LinkSocket:
        """Destination: admit a connection; returns what to use from now on.

        The caller sets the deadline, and closes ``sock`` in any case.

        Args:
            sock: A connection on which nothing was read.
            peer: The source, for error texts.

        Raises:
            TlsError: As ``enter``.
            TokenError: As ``enter``.
            PeerLostError: The connection broke.
            PeerProtocolError: The other end does not speak this protocol.
        """
        if not self._asks:
            await _turn_away_who_asks(sock, peer)
            return sock
        magic = await _receive(sock, peer, _MAGIC_BYTES)
        names: list[str] = []
        if self._context is not None:
            if not looks_like_tls(magic):
                await _part(sock, _told(magic, Verdict.NO_TLS))
                raise TlsError(
                    f"{peer} does not speak TLS: give both commands --tls-dir, or neither"
                )
            tls = TlsSocket(sock, self._context, peer, received=magic)
            await tls.handshake()
            names = tls.certificate_names()
            sock = tls
            magic = await _receive(sock, peer, _MAGIC_BYTES)
        elif looks_like_tls(magic):
            await _part(sock, Answer(Verdict.TOKEN_MISSING).encode())
            raise _speaks_tls(peer)
        await self._judge(sock, peer, magic, names)
        return sock

    async def _judge(self, sock: LinkSocket, peer: str, magic: bytes, names: list[str]) -> None:
        opening = None
        if magic != MAGIC:
            try:
                rest = OPENING_BYTES - _MAGIC_BYTES if magic == ADMISSION_MAGIC else 0
                opening = Opening.decode(magic + await _receive(sock, peer, rest))
            except AdmissionError as error:
                raise PeerProtocolError(f"{peer} broke the admission: {error}") from error
        verdict = self._verdict(opening, names)
        if opening is None or verdict not in {Verdict.ADMITTED, Verdict.PROVE}:
            await _part(sock, _told(magic, verdict))
            raise _turned_away(verdict, peer, names)
        if self._token is None:
            await _send(sock, peer, Answer(verdict).encode())
            return
        nonces = opening.nonce, self._random_bytes(NONCE_BYTES)
        await _send(sock, peer, Answer(Verdict.PROVE, nonces[1]).encode())
        proof = await _receive(sock, peer, PROOF_BYTES)
        if not is_proof(proof, self._token, Role.SOURCE, *nonces):
            await _part(sock, Answer(Verdict.TOKEN_WRONG).encode())
            raise _turned_away(Verdict.TOKEN_WRONG, peer, names)
        ours = prove(self._token, Role.DESTINATION, *nonces)
        await _send(sock, peer, Answer(Verdict.ADMITTED, ours).encode())

    def _verdict(self, opening: Opening | None, names: list[str]) -> Verdict:
        if opening is not None and opening.version != VERSION:
            return Verdict.VERSION_UNKNOWN
        allowed = {name.casefold() for name in self._security.tls_authz}
        if allowed and not allowed & {name.casefold() for name in names}:
            return Verdict.NOT_AUTHORIZED
        has_token = opening is not None and opening.has_token
        if (self._token is not None) == has_token:
            return Verdict.PROVE if has_token else Verdict.ADMITTED
        return Verdict.TOKEN_UNKNOWN if has_token else Verdict.TOKEN_MISSING


def read_token(path: Path) -> bytes:
    """Read a shared token: the file's content without white space around it.

    Raises:
        TokenError: The file cannot be read, can be read by others, or holds too little.
    """
    check_private(path, TokenError)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TOKEN_FILE_BYTES + 1)
    except OSError as error:
        raise TokenError(f"cannot read {path}: {error.strerror}") from error
    token = content.strip()
    if len(content) > MAX_TOKEN_FILE_BYTES:
        raise TokenError(f"{path} is longer than {MAX_TOKEN_FILE_BYTES} bytes")
    if len(token) < MIN_TOKEN_BYTES:
        raise TokenError(
            f"the token in {path} has {len(token)} bytes, expected {MIN_TOKEN_BYTES} or more: "
            f"openssl rand -hex 32 > {path}"
        )
    return token


async def _turn_away_who_asks(sock: LinkSocket, peer: str) -> None:
    """Look at the first bytes: who wants TLS or a token should hear that there is none here."""
    if not isinstance(sock, trio.socket.SocketType):
        return
    try:
        start = await sock.recv(_MAGIC_BYTES, socket.MSG_PEEK)
    except OSError as error:
        raise PeerLostError(f"lost the connection to {peer}: {reason(error)}") from error
    if looks_like_tls(start) or start == ADMISSION_MAGIC:
        await _part(sock, Answer(Verdict.TOKEN_UNKNOWN).encode())
        if start == ADMISSION_MAGIC:
            raise _turned_away(Verdict.TOKEN_UNKNOWN, peer, [])
        raise _speaks_tls(peer)


def _speaks_tls(peer: str) -> TlsError:
    return TlsError(f"{peer} speaks TLS: give both commands --tls-dir, or neither")


# --- texts ----------------------------------------------------------------------------------------

_REFUSALS: Final = {
    Verdict.VERSION_UNKNOWN: "{peer} is of another version; install the same one on both sides",
    Verdict.NO_TLS: "{peer} takes only TLS: give both commands --tls-dir, or neither",
    Verdict.NOT_AUTHORIZED: "{peer} does not admit our certificate: its --tls-authz has no name "
    "of it",
    Verdict.TOKEN_MISSING: "{peer} wants a token: give both commands --token-file, or neither",
    Verdict.TOKEN_UNKNOWN: "{peer} was started without --token-file: give it to both commands, or "
    "neither",
    Verdict.TOKEN_WRONG: "{peer} has another token: --token-file must be the same on both sides",
}
"""What the source says of a verdict."""

_TURNED_AWAY: Final = {
    Verdict.VERSION_UNKNOWN: "{peer} is of another version; install the same one on both sides",
    Verdict.NOT_AUTHORIZED: "the certificate of {peer} is for {names}: --tls-authz admits none of "
    "them",
    Verdict.TOKEN_MISSING: "{peer} has no token: give both commands --token-file, or neither",
    Verdict.TOKEN_UNKNOWN: "{peer} wants to prove a token: give both commands --token-file, or "
    "neither",
    Verdict.TOKEN_WRONG: "{peer} has another token: --token-file must be the same on both sides",
}
"""What the destination says."""

_TLS_VERDICTS: Final = {Verdict.NO_TLS, Verdict.NOT_AUTHORIZED}


def _class_of(verdict: Verdict) -> type[MigrationError]:
    if verdict is Verdict.VERSION_UNKNOWN:
        return PeerProtocolError
    return TlsError if verdict in _TLS_VERDICTS else TokenError


def _refused(answer: Answer, peer: str) -> MigrationError:
    text = _REFUSALS.get(answer.verdict)
    if text is None:
        said = answer.verdict.name
        return PeerProtocolError(f"{peer} broke the admission: {said} is no answer here")
    return _class_of(answer.verdict)(text.format(peer=peer))


def _turned_away(verdict: Verdict, peer: str, names: list[str]) -> MigrationError:
    shown = ", ".join(map(repr, names)) or "no name"
    return _class_of(verdict)(_TURNED_AWAY[verdict].format(peer=peer, names=shown))


def _told(magic: bytes, verdict: Verdict) -> bytes:
    """A refusal in the language of who began with this magic: answer or frame."""
    if magic != MAGIC:
        return Answer(verdict).encode()
    text = _REFUSALS[verdict].format(peer="this migrate-dst")
    refused = Refused(_class_of(verdict).code, text)
    return b"".join(encode_frame(refused.frame_type, 0, *encode_message(refused)))


# --- bytes ----------------------------------------------------------------------------------------


async def _send(sock: LinkSocket, peer: str, data: bytes) -> None:
    try:
        await send_views(sock, [memoryview(data)])
    except OSError as error:
        raise PeerLostError(f"lost the connection to {peer}: {reason(error)}") from error


async def _receive(sock: LinkSocket, peer: str, count: int) -> bytes:
    """Receive exactly so many bytes: what follows is not ours."""
    received = memoryview(bytearray(count))
    missing = received
    try:
        while missing:
            got = await sock.recv_into(missing)
            if not got:
                raise PeerLostError(f"{peer} closed the connection before it was admitted")
            missing = missing[got:]
    except OSError as error:
        raise PeerLostError(f"lost the connection to {peer}: {reason(error)}") from error
    return bytes(received)


async def _part(sock: LinkSocket, last: bytes) -> None:
    """Say a last word and wait until it was heard; a close with bytes unread would overtake it."""
    scratch = bytearray(4096)
    with trio.move_on_after(PART_S), contextlib.suppress(OSError):
        await send_views(sock, [memoryview(last)])
        sock.shutdown(socket.SHUT_WR)
        allowed = MAX_HANDSHAKE_BYTES
        while allowed > 0 and (count := await sock.recv_into(scratch)):
            allowed -= count
