"""The hop over several connections: real sockets, written by tasks in any rhythm."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from migrate.errors import GuestError, QemuStreamBrokenError
from migrate.params import UnixAddress
from migrate.qemu.multifd_hop import MultifdHop, accept_multifd
from migrate.transport.channels import connect, listen
from proto.guest_events import End, GuestEvent, RamBlocks
from tests import golden_streams
from tests import multifd_streams as ms
from tests import qemu_streams as qs

Sock = trio.socket.SocketType


@asynccontextmanager
async def hop_and_peers(count: int) -> AsyncIterator[tuple[MultifdHop, list[Sock]]]:
    """A hop with this many channels, and the other ends of its connections."""
    pairs = [trio.socket.socketpair() for _ in range(1 + count)]
    hop = MultifdHop(pairs[0][0])
    for ours, _ in pairs[1:]:
        hop.add_channel(ours)
    hop.settle()
    peers = [theirs for _, theirs in pairs]
    try:
        yield hop, peers
    finally:
        hop.close()
        for sock in peers:
            sock.close()


async def send(sock: Sock, data: bytes, piece_bytes: int = 100_000) -> None:
    """Write as QEMU does: it may wait for the reader, and hears when that is gone."""
    with contextlib.suppress(OSError):
        for at in range(0, len(data), piece_bytes):
            rest = memoryview(data)[at : at + piece_bytes]
            while rest.nbytes:
                rest = rest[await sock.send(rest) :]


async def read_to_end(hop: MultifdHop, burst_bytes: int = 1 << 20) -> list[GuestEvent]:
    events: list[GuestEvent] = []
    with trio.fail_after(5):
        while not (events and isinstance(events[-1], End)):
            events += await hop.next_events(burst_bytes)
    return events


def ram_of(events: Sequence[GuestEvent]) -> dict[tuple[str, int], bytes]:
    blocks = next(event for event in events if isinstance(event, RamBlocks))
    names = [block.idstr for block in blocks.blocks]
    return ms.ram_of([list(ms.pages_in(events, names))])


@pytest.mark.parametrize("name", ["7.2-multifd-busy", "10.0-multifd-busy", "7.2-multifd-zstd"])
@pytest.mark.parametrize("burst_bytes", [1 << 16, 4 << 20])
async def test_a_recorded_migration_comes_whole(name: str, burst_bytes: int) -> None:
    connections = golden_streams.load_connections(name)
    async with (
        hop_and_peers(len(connections) - 1) as (hop, peers),
        trio.open_nursery() as nursery,
    ):
        for sock, data in zip(peers, connections, strict=True):
            nursery.start_soon(send, sock, data)
        events = await read_to_end(hop, burst_bytes)
        assert ram_of(events) == ms.ram_of(ms.parse(connections))
        assert hop.bytes_received == sum(map(len, connections))
        assert hop.channel_count == 2


async def test_pages_do_not_wait_for_the_main_connection() -> None:
    """They are handed out while it is silent, and so never pile up here."""
    start = qs.header() + qs.ram_start(qs.BLOCKS)
    page = ms.packet(b"pc.ram", [(7, qs.page_of(1))])
    async with hop_and_peers(1) as (hop, (main, channel)):
        await send(main, start)
        await send(channel, ms.initial(0) + ms.packet(flags=1) + page)
        events: list[GuestEvent] = []
        while not list(ms.pages_in(events, ["pc.ram"])):
            events += await hop.next_events(1 << 20)
        assert list(ms.pages_in(events, ["pc.ram"])) == [("pc.ram", 7, qs.page_of(1))]


@pytest.mark.parametrize("cut", ["channel in a packet", "channel before a sync", "main"])
async def test_a_connection_that_ends_early_is_an_error(cut: str) -> None:
    start = qs.header() + qs.ram_start(qs.BLOCKS)
    page = ms.packet(b"pc.ram", [(7, qs.page_of(1))])
    async with hop_and_peers(2) as (hop, (main, *channels)):
        await send(main, start)
        for number, channel in enumerate(channels):
            await send(channel, ms.initial(number) + ms.packet(flags=1))
        if cut == "channel in a packet":
            await send(channels[1], page[:-1])
            channels[1].close()
        elif cut == "channel before a sync":
            await send(main, qs.section(b""))
            await send(channels[1], page)
            channels[1].close()
        else:
            main.close()
        with pytest.raises(QemuStreamBrokenError, match="the end"):
            await read_to_end(hop)


async def test_channels_may_end_before_the_main_connection_does() -> None:
    """A source without return path closes all of them when it wrote its last byte."""
    connections = golden_streams.load_connections("7.2-multifd-single")
    whole, last = connections[0][:-1], connections[0][-1:]
    async with hop_and_peers(1) as (hop, (main, channel)):
        events: list[GuestEvent] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, main, whole)
            nursery.start_soon(send, channel, connections[1])
            while hop.bytes_received < sum(map(len, connections)) - 1:
                events += await hop.next_events(1 << 20)
        channel.close()
        await trio.testing.wait_all_tasks_blocked()
        await send(main, last)
        events += await read_to_end(hop)
        assert isinstance(events[-1], End)


async def test_a_call_off_reads_on_until_the_peer_is_gone() -> None:
    """QEMU writes to its channels until it notices."""
    async with hop_and_peers(2) as (hop, (_, *channels)), trio.open_nursery() as nursery:
        done: list[int] = []

        async def write(sock: Sock) -> None:
            await send(sock, bytes(4 << 20))
            done.append(4 << 20)
            sock.close()

        for channel in channels:
            nursery.start_soon(write, channel)
        await hop.call_off()
        assert done == [4 << 20] * 2


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
async def test_connections_are_told_apart_in_any_order(
    short_tmp: Path, order: tuple[int, ...]
) -> None:
    connections = golden_streams.load_connections("10.0-multifd-busy")
    address = UnixAddress(short_tmp / "s")
    listener = await listen(address, "QEMU")
    with trio.fail_after(5):
        socks = [await connect(address, "us") for _ in order]
        async with trio.open_nursery() as nursery:
            for sock, number in zip(socks, order, strict=True):
                nursery.start_soon(send, sock, connections[number])
            hop = await accept_multifd(listener, 2)
            events = await read_to_end(hop)
            assert ram_of(events) == ms.ram_of(ms.parse(connections))
            hop.close()
    for sock in (listener, *socks):
        sock.close()


async def test_connections_without_a_main_one_are_an_error(short_tmp: Path) -> None:
    address = UnixAddress(short_tmp / "s")
    listener = await listen(address, "QEMU")
    with trio.fail_after(5):
        socks = [await connect(address, "us") for _ in range(2)]
        for number, sock in enumerate(socks):
            await send(sock, ms.initial(number))
        with pytest.raises(GuestError, match="a stream and 1 multifd channels"):
            await accept_multifd(listener, 1)
        for sock in socks:
            with contextlib.suppress(ConnectionResetError):
                assert await sock.recv(1) == b""
            sock.close()
    listener.close()
