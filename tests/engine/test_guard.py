"""Who passes the guard, over real connections: each end says in one line why the other does not."""

import secrets
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from migrate.errors import (
    MigrationError,
    PeerLostError,
    PeerProtocolError,
    PeerRefusedError,
    TlsError,
    TokenError,
)
from migrate.lab.certificates import Validity
from migrate.link_security import LinkSecurity
from migrate.params import LinkAddress
from migrate.transport import tls_credentials
from migrate.transport.channels import LinkSocket
from migrate.transport.guard import Guard
from migrate.transport.link import Link
from migrate.transport.socket_stream import start_stream
from proto.link.admission import Answer, Opening, Verdict, prove
from proto.link.messages import Hello, Refused
from proto.link.session import LinkSession
from proto.link.state import Role
from tests.link_pair import HELLO
from tests.pki import EXPIRED, NOT_YET, Pki, write_secret

OPEN = LinkSecurity()
DST, SRC = "migrate-dst at 127.0.0.1:7001", "migrate-src at 127.0.0.1"


@dataclass
class Met:
    """What became of a connection, at both ends."""

    source: str = ""
    destination: str = ""
    errors: list[MigrationError] = field(default_factory=list)
    sockets: list[LinkSocket] = field(default_factory=list)


async def meet(
    source: LinkSecurity,
    destination: LinkSecurity,
    host: str = "127.0.0.1",
) -> Met:
    """Connect both ends, say HELLO, and note what each end says."""
    met = Met()
    guards = {
        Role.SOURCE: Guard(Role.SOURCE, source, secrets.token_bytes),
        Role.DESTINATION: Guard(Role.DESTINATION, destination, secrets.token_bytes),
    }
    for guard in guards.values():
        guard.load()
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def go(near: LinkSocket) -> None:
        try:
            sock = await guards[Role.SOURCE].enter(near, LinkAddress(host, 7001), DST)
            met.sockets.append(sock)
            link = Link(start_stream(sock, Role.SOURCE), LinkSession(Role.SOURCE), DST)
            with closing(link):
                await link.send(HELLO)
                if isinstance(answer := await link.receive(), Refused):
                    raise PeerRefusedError(answer.message)
        except MigrationError as error:
            met.source = str(error)
            met.errors.append(error)
        near.close()

    async def come() -> None:
        far = (await listener.accept()).socket
        try:
            sock = await guards[Role.DESTINATION].admit(far, SRC)
            met.sockets.append(sock)
            stream = start_stream(sock, Role.DESTINATION)
            with closing(Link(stream, LinkSession(Role.DESTINATION), SRC)) as link:
                assert isinstance(await link.receive(), Hello)
                await link.farewell(Refused("met", "met"))
        except MigrationError as error:
            met.destination = str(error)
            met.errors.append(error)
        far.close()

    port = listener.socket.getsockname()[1]
    with trio.fail_after(10):
        near = (await trio.open_tcp_stream("127.0.0.1", port)).socket
        async with listener, trio.open_nursery() as nursery:
            nursery.start_soon(go, near)
            nursery.start_soon(come)
    return met


@pytest.fixture
def tls_dir(pki: Pki, tmp_path: Path) -> Path:
    return pki.directory(tmp_path / "tls")


@pytest.fixture
def token(tmp_path: Path) -> Path:
    return write_secret(tmp_path / "token", b"correct horse battery staple, 32+")


@pytest.fixture
def other_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner of a certificate does not see that it is bad: his clock, or his list, differs."""
    monkeypatch.setattr(tls_credentials, "check_own_certificate", lambda *_: None)


@pytest.mark.parametrize("with_tls", [False, True])
@pytest.mark.parametrize("with_token", [False, True])
async def test_two_ends_that_ask_the_same_meet(
    tls_dir: Path, token: Path, with_tls: bool, with_token: bool
) -> None:
    security = LinkSecurity(
        tls_dir=tls_dir if with_tls else None, token_file=token if with_token else None
    )
    met = await meet(security, security)
    assert (met.source, met.destination) == ("met", "")


# --- certificates ---------------------------------------------------------------------------------


async def test_certificate_of_another_ca(pki: Pki, tls_dir: Path, tmp_path: Path) -> None:
    other = LinkSecurity(tls_dir=Pki().directory(tmp_path / "other"))
    ours = LinkSecurity(tls_dir=tls_dir)
    met = await meet(ours, other)
    assert met.source == f"the certificate of {DST} was not issued by a CA in our ca-cert.pem"
    assert met.destination == (
        f"{SRC} did not take our certificate: it was not issued by a CA that the other side trusts"
    )
    assert {type(error) for error in met.errors} == {TlsError}
    # Only the destination trusts too little.
    both = tmp_path / "both"
    both.mkdir()
    for path in tls_dir.iterdir():
        path.rename(both / path.name)
    authorities = [both / "ca-cert.pem", tmp_path / "other" / "ca-cert.pem"]
    (both / "ca-cert.pem").write_bytes(b"".join(path.read_bytes() for path in authorities))
    met = await meet(LinkSecurity(tls_dir=both), other)
    assert (
        met.destination == f"the certificate of {SRC} was not issued by a CA in our ca-cert.pem"
    )
    assert met.source == (
        f"{DST} did not take our certificate: it was not issued by a CA that the other side trusts"
    )


@pytest.mark.usefixtures("other_clock")
@pytest.mark.parametrize(
    ("validity", "text", "told"),
    [
        (EXPIRED, "has expired", "it, or the list of revoked ones, has expired"),
        (
            NOT_YET,
            "is not valid yet (are the clocks of both hosts right?)",
            "it is for another",
        ),
    ],
)
async def test_certificate_out_of_its_time(
    pki: Pki, tmp_path: Path, validity: Validity, text: str, told: str
) -> None:
    good = LinkSecurity(tls_dir=pki.directory(tmp_path / "good"))
    pairs = [pki.issue(role, validity=validity) for role in (Role.SOURCE, Role.DESTINATION)]
    directory = pki.directory(tmp_path / "bad", source=pairs[0], destination=pairs[1])
    bad = LinkSecurity(tls_dir=directory)
    met = await meet(good, bad)
    assert met.source == f"the certificate of {DST} {text}"
    assert met.destination.startswith(f"{SRC} did not take our certificate: {told}")
    met = await meet(bad, good)
    assert met.destination == f"the certificate of {SRC} {text}"
    assert met.source.startswith(f"{DST} did not take our certificate: {told}")


@pytest.mark.usefixtures("other_clock")
async def test_certificate_for_the_wrong_purpose(
    pki: Pki, tls_dir: Path, tmp_path: Path
) -> None:
    swapped = pki.directory(
        tmp_path / "bad",
        source=pki.pairs[Role.DESTINATION],
        destination=pki.pairs[Role.SOURCE],
    )
    bad = LinkSecurity(tls_dir=swapped)
    good = LinkSecurity(tls_dir=tls_dir)
    met = await meet(good, bad)
    assert met.source.startswith(f"the certificate of {DST} is not for this purpose")
    assert met.destination == f"{SRC} did not take our certificate: it is not for this purpose"
    met = await meet(bad, good)
    assert met.destination.startswith(f"the certificate of {SRC} is not for this purpose")
    assert met.source == f"{DST} did not take our certificate: it is not for this purpose"


async def test_revoked_certificate(pki: Pki, tls_dir: Path, tmp_path: Path) -> None:
    good = LinkSecurity(tls_dir=tls_dir)
    fresh = {role: pki.issue(role) for role in Role}
    for role in Role:
        path = pki.directory(
            tmp_path / role.name,
            crl=pki.revoked(pki.pairs[role]),
            source=fresh[Role.SOURCE],
            destination=fresh[Role.DESTINATION],
        )
        listed = LinkSecurity(tls_dir=path)
        if role is Role.DESTINATION:
            met = await meet(listed, good)
            assert met.source == f"the certificate of {DST} was revoked"
            assert met.destination == f"{SRC} did not take our certificate: it was revoked"
        else:
            met = await meet(good, listed)
            assert met.destination == f"the certificate of {SRC} was revoked"
            assert met.source == f"{DST} did not take our certificate: it was revoked"


@pytest.mark.parametrize(
    ("host", "hostname", "good"),
    [
        ("localhost", None, True),
        ("127.0.0.1", None, True),
        ("::1", None, True),
        ("::1%lo", None, True),
        ("127.0.0.2", None, False),
        ("localhost.example.org", None, False),
        ("host-a", None, False),  # the common name is no name of a host
        ("10.1.2.3", "localhost", True),
        ("localhost", "10.1.2.3", False),
    ],
)
async def test_the_name_that_the_source_connects_to(
    tls_dir: Path, host: str, hostname: str | None, good: bool
) -> None:
    ours = LinkSecurity(tls_dir=tls_dir, tls_hostname=hostname)
    met = await meet(ours, LinkSecurity(tls_dir=tls_dir), host)
    if good:
        assert met.source == "met"
        return
    assert met.source == (
        f"the certificate of {DST} is not for '{hostname or host}': use a name that it has, or "
        "say which with --tls-hostname"
    )
    assert met.destination.startswith(f"{SRC} did not take our certificate: it is for another")


@pytest.mark.parametrize(
    ("allowed", "good"),
    [
        (("host-a",), True),
        (("host-b", "LOCALHOST"), True),
        (("127.0.0.1",), True),
        (("host-b",), False),
        (("host",), False),
    ],
)
async def test_the_names_that_the_destination_admits(
    tls_dir: Path, allowed: tuple[str, ...], good: bool
) -> None:
    ours = LinkSecurity(tls_dir=tls_dir)
    met = await meet(ours, LinkSecurity(tls_dir=tls_dir, tls_authz=allowed))
    if good:
        assert met.source == "met"
        return
    assert met.source == (
        f"{DST} does not admit our certificate: its --tls-authz has no name of it"
    )
    assert met.destination == (
        f"the certificate of {SRC} is for 'host-a', 'localhost', '127.0.0.1', '0:0:0:0:0:0:0:1': "
        "--tls-authz admits none of them"
    )
    assert [error.code for error in met.errors] == ["tls", "tls"]


# --- one side asks for what the other has not -----------------------------------------------------

BOTH_OR_NEITHER = "give both commands --tls-dir, or neither"
TOKEN_BOTH = "give both commands --token-file, or neither"

Ask = Callable[[Path, Path], LinkSecurity]
ASK: dict[str, Ask] = {
    "nothing": lambda tls, token: OPEN,
    "tls": lambda tls, token: LinkSecurity(tls_dir=tls),
    "token": lambda tls, token: LinkSecurity(token_file=token),
    "both": lambda tls, token: LinkSecurity(tls_dir=tls, token_file=token),
}
PLAIN_AT_TLS = (
    f"this migrate-dst takes only TLS: {BOTH_OR_NEITHER}",
    f"{SRC} does not speak TLS: {BOTH_OR_NEITHER}",
)
ONE_SIDED = {
    ("nothing", "tls"): PLAIN_AT_TLS,
    ("nothing", "both"): PLAIN_AT_TLS,
    ("token", "tls"): (f"{DST} takes only TLS: {BOTH_OR_NEITHER}", PLAIN_AT_TLS[1]),
    ("tls", "nothing"): (
        f"{DST} does not speak TLS: {BOTH_OR_NEITHER}",
        f"{SRC} speaks TLS: {BOTH_OR_NEITHER}",
    ),
    ("tls", "token"): (
        f"{DST} does not speak TLS: {BOTH_OR_NEITHER}",
        f"{SRC} speaks TLS: {BOTH_OR_NEITHER}",
    ),
    ("nothing", "token"): (
        f"this migrate-dst wants a token: {TOKEN_BOTH}",
        f"{SRC} has no token: {TOKEN_BOTH}",
    ),
    ("token", "nothing"): (
        f"{DST} was started without --token-file: give it to both commands, or neither",
        f"{SRC} wants to prove a token: {TOKEN_BOTH}",
    ),
    ("tls", "both"): (
        f"{DST} wants a token: {TOKEN_BOTH}",
        f"{SRC} has no token: {TOKEN_BOTH}",
    ),
    ("both", "tls"): (
        f"{DST} was started without --token-file: give it to both commands, or neither",
        f"{SRC} wants to prove a token: {TOKEN_BOTH}",
    ),
}


@pytest.mark.parametrize(("source", "destination"), ONE_SIDED)
async def test_one_side_asks_for_more(
    tls_dir: Path, token: Path, source: str, destination: str
) -> None:
    met = await meet(ASK[source](tls_dir, token), ASK[destination](tls_dir, token))
    assert (met.source, met.destination) == ONE_SIDED[source, destination]


async def test_another_token(tls_dir: Path, token: Path, tmp_path: Path) -> None:
    other = write_secret(tmp_path / "other", b"correct horse battery staple, 32-")
    met = await meet(LinkSecurity(token_file=token), LinkSecurity(token_file=other))
    same = "another token: --token-file must be the same on both sides"
    assert (met.source, met.destination) == (f"{DST} has {same}", f"{SRC} has {same}")
    assert {type(error) for error in met.errors} == {TokenError}


# --- ends that are not ours -----------------------------------------------------------------------


async def listening(
    serve: Callable[[LinkSocket], Awaitable[None]], security: LinkSecurity
) -> MigrationError:
    """Enter where something else listens; returns the source's error."""
    guard = Guard(Role.SOURCE, security, secrets.token_bytes)
    guard.load()
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = LinkAddress("127.0.0.1", listener.socket.getsockname()[1])

    async def answer() -> None:
        sock = (await listener.accept()).socket
        await serve(sock)
        sock.close()

    with trio.fail_after(10):
        async with listener, trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            sock = (await trio.open_tcp_stream(address.host, address.port)).socket
            with pytest.raises(MigrationError) as raised:
                await guard.enter(sock, address, DST)
            assert sock.fileno() == -1
    return raised.value


async def test_destination_that_does_not_prove_the_token(token: Path) -> None:
    async def admit_at_once(sock: LinkSocket) -> None:
        await sock.recv_into(bytearray(64))
        await sock.sendmsg([memoryview(Answer(Verdict.ADMITTED).encode())], [], 0)

    async def play_back(sock: LinkSocket) -> None:
        """Give the source its own nonce, and its own proof for the destination's."""
        data = bytearray(64)
        await sock.recv_into(data)
        nonce = Opening.decode(bytes(data[:40])).nonce
        await sock.sendmsg([memoryview(Answer(Verdict.PROVE, nonce).encode())], [], 0)
        await sock.recv_into(data)
        proof = Answer(Verdict.ADMITTED, bytes(data[:32])).encode()
        await sock.sendmsg([memoryview(proof)], [], 0)

    security = LinkSecurity(token_file=token)
    error = await listening(admit_at_once, security)
    assert isinstance(error, PeerProtocolError)
    assert str(error) == f"{DST} broke the admission: ADMITTED is no answer here"
    error = await listening(play_back, security)
    assert isinstance(error, TokenError)
    assert str(error) == f"{DST} could not prove that it has the token of --token-file"


@pytest.mark.parametrize("ask", ["tls", "token"])
@pytest.mark.parametrize(
    "said", [b"", b"220 mail ready\r\n" * 8, b"\x16\x03\x03\xff\xff" + bytes(99)]
)
async def test_something_else_listens(
    tls_dir: Path, token: Path, ask: str, said: bytes
) -> None:
    async def serve(sock: LinkSocket) -> None:
        await sock.recv_into(bytearray(4096))
        if said:
            await sock.sendmsg([memoryview(said)], [], 0)

    error = await listening(serve, ASK[ask](tls_dir, token))
    if not said:
        assert isinstance(error, PeerLostError)
        assert "closed the connection" in str(error)
    elif ask == "token":
        assert str(error).startswith(f"{DST} broke the admission: byte 0: expected d7 50 43 41")
    elif said.startswith(b"\x16"):
        assert str(error).startswith(f"the TLS handshake with {DST} failed: ")
    else:
        assert str(error) == f"{DST} does not speak TLS: {BOTH_OR_NEITHER}"


def test_proofs_are_of_one_end_and_one_connection() -> None:
    nonces = [secrets.token_bytes(32) for _ in range(3)]
    proofs = {
        prove(token, role, *pair)
        for token in (b"a" * 32, b"b" * 32)
        for role in Role
        for pair in ((nonces[0], nonces[1]), (nonces[1], nonces[0]), (nonces[0], nonces[2]))
    }
    assert len(proofs) == 12
