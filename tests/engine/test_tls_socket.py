"""A connection with TLS behaves like one without: every byte, in order, however it is cut."""

import contextlib
import random
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from migrate.errors import TlsError
from migrate.transport.channels import send_views, tune_link
from migrate.transport.tls import MAX_PIECE_BYTES, TlsSocket
from migrate.transport.tls_credentials import load_credentials
from proto.link.state import Role
from tests.pki import Pki


async def tcp_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        near = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        return near, await listener.accept()


@asynccontextmanager
async def secured(pki: Pki, folder: Path) -> AsyncIterator[tuple[TlsSocket, TlsSocket]]:
    """Both ends of a connection, hands shaken."""
    near, far = await tcp_pair()
    async with near, far:
        yield await shake_hands(pki, folder, near, far)


async def shake_hands(
    pki: Pki, folder: Path, near: trio.SocketStream, far: trio.SocketStream
) -> tuple[TlsSocket, TlsSocket]:
    directory = pki.directory(folder / "tls")
    contexts = {role: load_credentials(directory, role) for role in Role}
    client = TlsSocket(near.socket, contexts[Role.SOURCE], "server", hostname="127.0.0.1")
    server = TlsSocket(far.socket, contexts[Role.DESTINATION], "client")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.handshake)
        nursery.start_soon(server.handshake)
    return client, server


def pieces(data: bytes, chance: random.Random) -> list[memoryview]:
    """A gather list of tiny and of large buffers."""
    views, rest = [], memoryview(data)
    while rest:
        size = chance.choice([1, 24, 4096, 16384, 70_000, 2 * MAX_PIECE_BYTES])
        views.append(rest[:size])
        rest = rest[size:]
    return views


async def receive(sock: TlsSocket, count: int, chance: random.Random) -> bytes:
    received = bytearray()
    while len(received) < count:
        buffer = bytearray(min(chance.choice([1, 5, 5000, 1 << 20]), count - len(received)))
        got = await sock.recv_into(buffer)
        assert got
        received += buffer[:got]
    return bytes(received)


async def test_both_directions_at_once(pki: Pki, tmp_path: Path) -> None:
    chance = random.Random(5)
    there, back = chance.randbytes(3_000_001), chance.randbytes(1_000_003)

    async def check(sock: TlsSocket, expected: bytes, seed: int) -> None:
        assert await receive(sock, len(expected), random.Random(seed)) == expected

    with trio.fail_after(20):
        async with secured(pki, tmp_path) as (client, server), trio.open_nursery() as nursery:
            nursery.start_soon(send_views, client, pieces(there, chance))
            nursery.start_soon(send_views, server, pieces(back, chance))
            nursery.start_soon(check, server, there, 1)
            nursery.start_soon(check, client, back, 2)


async def test_a_cancelled_send_goes_on_where_it_was(pki: Pki, tmp_path: Path) -> None:
    chance = random.Random(7)
    data = chance.randbytes(9_000_000)
    cancelled = 0
    async with secured(pki, tmp_path) as (client, server):
        views = pieces(data, chance)
        received: list[bytes] = []

        async def slowly() -> None:
            for _ in range(9):
                await trio.sleep(0.01)
                received.append(await receive(server, 1_000_000, chance))

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(slowly)
                while views:
                    with trio.move_on_after(0.002) as scope:
                        await send_views(client, views)
                    cancelled += scope.cancelled_caught
    assert cancelled > 3
    assert b"".join(received) == data


async def test_waiting_for_much_is_no_deadlock(pki: Pki, tmp_path: Path) -> None:
    """SO_RCVLOWAT counts the bytes below TLS, some of which are in our memory already."""
    async with secured(pki, tmp_path) as (client, server):
        tune_link(client)
        data = secrets.token_bytes(3 * 131072 + 5)
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send_views, client, [memoryview(data)])
                buffer = memoryview(bytearray(len(data)))
                rest = buffer
                while rest:
                    low_water = min(len(rest), 131072)
                    server.setsockopt(
                        trio.socket.SOL_SOCKET, trio.socket.SO_RCVLOWAT, low_water
                    )
                    rest = rest[await server.recv_into(rest) :]
        assert buffer == data


async def test_the_end_of_the_stream(pki: Pki, tmp_path: Path) -> None:
    async with secured(pki, tmp_path) as (client, server):
        await send_views(client, [memoryview(b"last")])
        client.shutdown(trio.socket.SHUT_WR)
        buffer = bytearray(99)
        assert await server.recv_into(buffer) == 4
        for _ in range(2):
            assert await server.recv_into(buffer) == 0
        await send_views(server, [memoryview(b"answer")])
        assert await client.recv_into(buffer) == 6


async def test_a_flipped_bit_ends_the_connection_behind_what_was_good(
    pki: Pki, tmp_path: Path
) -> None:
    near, relay_near = await tcp_pair()
    relay_far, far = await tcp_pair()

    async def relay(source: trio.SocketStream, target: trio.SocketStream) -> None:
        async for data in source:
            good, mark, rest = bytes(data).partition(b"\x17\x03\x03\x0f\xff")
            if mark:
                rest = bytes([rest[0] ^ 1]) + rest[1:]
            await target.send_all(good + mark + rest)

    async with near, relay_near, relay_far, far, trio.open_nursery() as nursery:
        nursery.start_soon(relay, relay_near, relay_far)
        nursery.start_soon(relay, relay_far, relay_near)
        client, server = await shake_hands(pki, tmp_path, near, far)
        await send_views(client, [memoryview(b"good")])
        # An encrypted record is 17 bytes longer than what is in it.
        await send_views(client, [memoryview(bytes(0xFFF - 17))])
        assert await receive(server, 4, random.Random(0)) == b"good"
        for _ in range(2):
            with pytest.raises(OSError, match="TLS: decryption failed or bad record mac"):
                await server.recv_into(bytearray(1))
        nursery.cancel_scope.cancel()


async def test_a_handshake_that_never_ends_has_a_length(pki: Pki, tmp_path: Path) -> None:
    """A stranger who sends one long handshake message, record by record."""
    near, far = await tcp_pair()
    directory = pki.directory(tmp_path / "tls")
    context = load_credentials(directory, Role.DESTINATION)
    server = TlsSocket(far.socket, context, "a stranger")
    record = b"\x16\x03\x03\x40\x00" + bytes(0x4000)
    hello = b"\x01\x01\xff\x00"  # a ClientHello of 130,816 bytes
    first = b"\x16\x03\x03\x40\x00" + hello + bytes(0x3FFC)

    async def flood() -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await near.send_all(first)
            while True:
                await near.send_all(record)

    with trio.fail_after(10):
        async with near, far, trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            with pytest.raises(TlsError):
                await server.handshake()
            server.close()
