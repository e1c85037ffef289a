"""TLS for threads: every byte in both directions at once, and calls that wait can be ended."""

import random
import socket
import struct
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from migrate.transport.tls_channel import TlsChannel, first_bytes
from tests.engine.test_tls_socket import pieces, shake_hands, tcp_pair
from tests.pki import Pki

QUICKLY = struct.pack("ll", 0, 20_000)
"""Longest time in one call: 20 ms."""


@asynccontextmanager
async def channels(pki: Pki, folder: Path) -> AsyncIterator[tuple[TlsChannel, TlsChannel]]:
    near, far = await tcp_pair()
    ends = [end.for_threads() for end in await shake_hands(pki, folder, near, far)]
    client, server = ends
    assert client is not None
    assert server is not None
    for end in (client, server):
        end.setblocking(True)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, QUICKLY)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, QUICKLY)
    yield client, server
    client.close()
    server.close()


def take_off(views: list[memoryview], count: int) -> None:
    while count:
        part = views[0][count:]
        count = max(0, count - len(views[0]))
        views[:1] = [part] if part else []


def send_all(channel: TlsChannel, views: list[memoryview]) -> None:
    while views:
        try:
            take_off(views, channel.sendmsg(views))
        except BlockingIOError:
            continue


def receive(channel: TlsChannel, count: int, seed: int) -> bytes:
    chance = random.Random(seed)
    received = bytearray()
    while len(received) < count:
        size = min(chance.choice([1, 24, 5000, 300_000, 1 << 20]), count - len(received))
        flags = chance.choice([0, socket.MSG_WAITALL, socket.MSG_DONTWAIT])
        buffer = bytearray(size)
        try:
            got = channel.recv_into(buffer, size, flags)
        except BlockingIOError:
            continue
        assert got
        received += buffer[:got]
    return bytes(received)


async def test_both_directions_at_once(pki: Pki, tmp_path: Path) -> None:
    chance = random.Random(3)
    there, back = chance.randbytes(9_000_001), chance.randbytes(2_000_003)
    results: dict[str, bytes] = {}

    def keep(name: str, channel: TlsChannel, count: int) -> None:
        results[name] = receive(channel, count, count)

    with trio.fail_after(20):
        async with channels(pki, tmp_path) as (client, server), trio.open_nursery() as nursery:
            run = trio.to_thread.run_sync
            nursery.start_soon(run, send_all, client, pieces(there, chance))
            nursery.start_soon(run, send_all, server, pieces(back, chance))
            nursery.start_soon(run, keep, "there", server, len(there))
            nursery.start_soon(run, keep, "back", client, len(back))
    assert results == {"there": there, "back": back}


@pytest.mark.parametrize("size", [100_000, 300_000, 900_000, 1_000_001])
async def test_the_end_of_a_payload_does_not_wait_for_what_follows_it(
    pki: Pki, tmp_path: Path, size: int
) -> None:
    data = random.Random(size).randbytes(size)
    async with channels(pki, tmp_path) as (client, server):
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, bytes(16))

        def receive_whole() -> bytes:
            buffer = memoryview(bytearray(size))
            assert server.recv_into(buffer, size, socket.MSG_WAITALL) == size
            return bytes(buffer)

        try:
            with trio.fail_after(10):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(
                        trio.to_thread.run_sync, send_all, client, [memoryview(data)]
                    )
                    received = await trio.to_thread.run_sync(
                        receive_whole, abandon_on_cancel=True
                    )
        finally:
            server.shutdown(socket.SHUT_RDWR)
        assert received == data


def test_small_buffers_are_joined_to_records_and_large_ones_are_not_copied() -> None:
    small, large = memoryview(bytes(100)), memoryview(bytes(range(256)) * 1000)
    assert first_bytes([large, small], 128 * 1024) == large[: 128 * 1024]
    assert first_bytes([small] * 3, 1 << 20) == bytes(300)
    assert first_bytes([small, small, large], 1 << 20) == bytes(200) + large[: 16384 - 200]
    assert first_bytes([memoryview(bytes(16384)), large], 1 << 20) == bytes(16384)
    assert first_bytes([small, large], 150) == bytes(100) + large[:50]
    assert first_bytes([small, small], 150) == bytes(150)


async def test_a_peer_that_takes_nothing_in_blocks_and_nothing_is_lost(
    pki: Pki, tmp_path: Path
) -> None:
    data = random.Random(4).randbytes(24_000_000)
    async with channels(pki, tmp_path) as (client, server):
        views, blocked = [memoryview(data)], 0
        while blocked < 3:
            try:
                take_off(views, client.sendmsg(views, (), socket.MSG_DONTWAIT))
            except BlockingIOError:
                blocked += 1
        assert views
        thread = threading.Thread(target=send_all, args=(client, views))
        thread.start()
        assert receive(server, len(data), 1) == data
        thread.join()


async def test_what_waits_ends_when_the_connection_is_shut_down(
    pki: Pki, tmp_path: Path
) -> None:
    async with channels(pki, tmp_path) as (client, server):
        for flags in (0, socket.MSG_DONTWAIT, socket.MSG_WAITALL):
            with pytest.raises(BlockingIOError):
                server.recv_into(bytearray(99), 99, flags)
        client.sendmsg([memoryview(b"last")])
        client.shutdown(socket.SHUT_RDWR)
        buffer = bytearray(99)
        assert server.recv_into(buffer, 99, socket.MSG_WAITALL) == 4
        assert server.recv_into(buffer) == 0
        assert client.recv_into(buffer) == 0
        with pytest.raises(OSError, match="Broken pipe"):
            client.sendmsg([memoryview(b"more")])
