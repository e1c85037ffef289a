"""The hop into a QEMU over several connections: real sockets, read by tasks in any rhythm."""

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trio
import trio.testing

from migrate.errors import ConnectError, QemuStreamBrokenError
from migrate.params import UnixAddress
from migrate.qemu.loader import QemuLoader
from migrate.qemu.multifd_out import MultifdOut, connect_multifd
from proto.guest_events import PAGE_SIZE, Opaque, OpaqueKind, PageRun, RamBlocks
from proto.qemu.multifd_writer import Interval, MultifdWriter
from tests import multifd_streams as ms
from tests import qemu_streams as qs
from tests.strategies import page_array

Sock = trio.socket.SocketType
START = RamBlocks(qs.ram_blocks(), qs.ram_start(qs.BLOCKS))
HEADER = Opaque(OpaqueKind.HEADER, qs.header())


@asynccontextmanager
async def hop_and_peers(count: int) -> AsyncIterator[tuple[MultifdOut, list[Sock]]]:
    """A hop with this many channels, and the other ends of its connections."""
    pairs = [trio.socket.socketpair() for _ in range(1 + count)]
    hop = MultifdOut(pairs[0][0], [ours for ours, _ in pairs[1:]])
    peers = [theirs for _, theirs in pairs]
    try:
        with trio.fail_after(5):
            await trio.lowlevel.checkpoint()
            yield hop, peers
    finally:
        hop.close()
        for sock in peers:
            sock.close()


async def read_all(sock: Sock, into: bytearray) -> None:
    """Read until the other end is closed."""
    with contextlib.suppress(ConnectionResetError):
        while data := await sock.recv(1 << 16):
            into += data


def pages(seed: int) -> PageRun:
    """More than sockets hold."""
    content = b"".join(qs.page_of(seed + page) for page in range(400))
    return PageRun(
        0, page_array(range(400)), np.frombuffer(content, np.uint8).reshape(-1, PAGE_SIZE)
    )


async def test_what_is_loaded_comes_over_all_connections() -> None:
    received = [bytearray() for _ in range(3)]
    async with (
        hop_and_peers(2) as (hop, peers),
        trio.open_nursery() as nursery,
    ):
        for sock, into in zip(peers, received, strict=True):
            nursery.start_soon(read_all, sock, into)
        loader = QemuLoader(hop, MultifdWriter(2, sync_per_section=True))
        await loader.load([])
        await loader.load([HEADER, START, pages(1), pages(2)])
        await loader.mark(1)
        with trio.move_on_after(0.2):  # nobody answers
            await loader.load_devices(qs.tail(), 2)
        await hop.send([qs.tail()[-len(qs.DESCRIPTION) - 6 :]])
        loader.close()
    main, *channels = received
    end = main.index(qs.tail()[:20])
    intervals = ms.parse([bytes(main[:end]) + qs.tail(), *map(bytes, channels)])
    expected = {("pc.ram", page): qs.page_of(2 + page) for page in range(400)}
    assert ms.ram_of(intervals) == expected


async def test_the_main_connection_waits_for_the_channels() -> None:
    size = 8 << 20
    got = [bytearray() for _ in range(3)]
    async with hop_and_peers(2) as (hop, peers):
        async with trio.open_nursery() as nursery:
            interval = Interval(([bytes(size)], [b"small"]), [b"main"])
            nursery.start_soon(hop.send_intervals, [interval])
            for number in (0, 2):
                nursery.start_soon(read_all, peers[number], got[number])
            await trio.testing.wait_all_tasks_blocked()
            assert got[0] == b""
            assert got[2] == b"small"  # although the channel before it is not read
            nursery.start_soon(read_all, peers[1], got[1])
            while got[0] != b"main":  # noqa: ASYNC110
                await trio.sleep(0.01)
            hop.close()
        assert len(got[1]) == size


@pytest.mark.parametrize("number", [0, 1])
async def test_a_channel_that_breaks_ends_the_load_whatever_the_others_do(number: int) -> None:
    async with hop_and_peers(2) as (hop, (_, *channels)):
        interval = Interval(([bytes(8 << 20)], [bytes(8 << 20)]), [b"main"])
        async with trio.open_nursery() as nursery:

            async def load() -> None:
                with pytest.raises(QemuStreamBrokenError, match="stopped loading"):
                    await hop.send_intervals([interval])

            nursery.start_soon(load)
            await trio.testing.wait_all_tasks_blocked()
            channels[number].close()


async def test_a_qemu_that_gives_up_a_channel_is_noticed_while_nothing_is_sent() -> None:
    async with hop_and_peers(2) as (hop, (_, *channels)), trio.open_nursery() as nursery:
        loader = QemuLoader(hop, MultifdWriter(2))
        nursery.start_soon(loader.read_return_path)
        nursery.start_soon(hop.watch_channels)
        await trio.testing.wait_all_tasks_blocked()
        channels[1].close()
        with pytest.raises(QemuStreamBrokenError, match="stopped loading"):
            await loader.wait_consumed(0)
        loader.close()


async def test_channels_may_end_before_the_main_connection_once_all_is_sent() -> None:
    async with hop_and_peers(1) as (hop, (main, channel)), trio.open_nursery() as nursery:
        loader = QemuLoader(hop, MultifdWriter(1))
        nursery.start_soon(loader.read_return_path)
        nursery.start_soon(hop.watch_channels)
        nursery.start_soon(loader.load_end)
        await trio.testing.wait_all_tasks_blocked()
        channel.close()
        await trio.testing.wait_all_tasks_blocked()
        await main.send(bytes.fromhex("0001 0004 00000000"))  # SHUT 0
        while loader.shut_value is None:  # noqa: ASYNC110
            await trio.sleep(0.01)
        assert loader.shut_value == 0
        loader.close()


async def test_all_connections_are_closed() -> None:
    received = [bytearray() for _ in range(3)]
    async with hop_and_peers(2) as (hop, peers), trio.open_nursery() as nursery:
        for sock, into in zip(peers, received, strict=True):
            nursery.start_soon(read_all, sock, into)
        hop.close()
        await hop.watch_channels()  # sees nothing


async def test_connections_that_are_not_taken_are_an_error(short_tmp: Path) -> None:
    path = short_tmp / "s"
    with pytest.raises(ConnectError, match="cannot reach QEMU"):
        await connect_multifd(UnixAddress(path), "QEMU", 2)


async def test_a_full_queue_is_waited_for(short_tmp: Path) -> None:
    """A QEMU that is busy accepts one connection after the other."""
    path = short_tmp / "s"
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen(0)
    socks: list[Sock] = []

    async def accept() -> None:
        while len(socks) < 9:
            await trio.sleep(0.01)
            socks.append((await listener.accept())[0])

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            hop = await connect_multifd(UnixAddress(path), "QEMU", 8)
    hop.close()
    for sock in (listener, *socks):
        sock.close()
