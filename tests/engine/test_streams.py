"""Connections at work: frames in order, bounds, no thread left behind; several as one link."""

import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from migrate.errors import PeerLostError
from migrate.transport.link import Link
from migrate.transport.memory_link import MemoryLinkParams, MemorySocket, memory_link
from migrate.transport.socket_stream import SocketStream, start_stream
from migrate.transport.stream import MAX_PENDING_BYTES, LinkStream, TaskStream
from migrate.transport.traffic import KEEPALIVE_S, PEER_SILENCE_S
from proto.link import messages
from proto.link.connection import LinkConnection
from proto.link.dispatch import encode_message
from proto.link.frames import Buffer, EndOfFrames, Frame, FrameType, encode_frame
from proto.link.messages import Hello, Message, Welcome
from proto.link.session import LinkSession
from proto.link.state import Role
from tests.link_pair import HELLO, PAGES, TABLE, welcome

KINDS = ("socket", "memory")
SIZES = (0, 1, 4096, 65_535, 65_536, 300_000, 1 << 20)
LINK = MemoryLinkParams(bandwidth_bps=1_000_000_000, delay_ms=0.1)
TOKEN = bytes(32)


async def tcp_pair() -> tuple[trio.socket.SocketType, trio.socket.SocketType]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        port = listener.socket.getsockname()[1]
        near = await trio.open_tcp_stream("127.0.0.1", port)
        return near.socket, (await listener.accept()).socket


async def pair(kind: str) -> tuple[LinkStream, LinkStream]:
    """Both ends of a connection, the source's first."""
    if kind == "memory":
        near, far = memory_link(LINK)
        return start_stream(near, Role.SOURCE), start_stream(far, Role.DESTINATION)
    ours, theirs = await tcp_pair()
    return start_stream(ours, Role.SOURCE), start_stream(theirs, Role.DESTINATION)


def opaque(seq: int, size: int) -> list[Buffer]:
    payload = bytes([seq % 251]) * size
    message = messages.OpaqueData(3, payload, size)  # type: ignore[arg-type]
    return encode_frame(FrameType.OPAQUE, seq, *encode_message(message))


def threads() -> set[str]:
    return {
        t.name for t in threading.enumerate() if "read_all" in t.name or "write_all" in t.name
    }


async def end_of_threads() -> None:
    while threads():  # noqa: ASYNC110
        await trio.sleep(0.002)


@pytest.mark.parametrize("kind", KINDS)
async def test_frames_arrive_as_they_were_written(kind: str) -> None:
    near, far = await pair(kind)
    sizes = [*SIZES, *reversed(SIZES), *[1 << 20] * 6, *[10] * 100]
    with closing(near), closing(far), trio.fail_after(10):
        for seq, size in enumerate(sizes, 1):
            near.write(opaque(seq, size))
        for seq, size in enumerate(sizes, 1):
            frame = await far.next()
            assert isinstance(frame, Frame)
            assert (frame.seq, len(frame.payload)) == (seq, size)
            assert bytes(frame.payload[:10]) == bytes([seq % 251]) * min(size, 10)
        await near.flush()
        assert near.unwritten_bytes == 0
        assert near.written_bytes == far.connection.received_bytes


@pytest.mark.parametrize("kind", KINDS)
async def test_what_nobody_takes_is_bounded_and_comes_later(kind: str) -> None:
    near, far = await pair(kind)
    frames = 40
    with closing(near), closing(far), trio.fail_after(10):
        for seq in range(1, frames + 1):
            near.write(opaque(seq, 1 << 20))
        with trio.move_on_after(0.3):
            await near.flush()
        assert near.unwritten_bytes
        assert far.connection.received_bytes < MAX_PENDING_BYTES + (3 << 20)
        for seq in range(1, frames + 1):
            frame = await far.next()
            assert isinstance(frame, Frame)
            assert frame.seq == seq


@pytest.mark.parametrize("kind", KINDS)
async def test_an_end_within_a_frame_says_what_is_lost(kind: str) -> None:
    near, far = await pair(kind)
    with closing(near), closing(far), trio.fail_after(10):
        near.write([*opaque(1, 5), b"".join(opaque(2, 100))[:70]])
        await near.flush()
        near.end()
        first = await far.next()
        assert isinstance(first, Frame)
        assert await far.next() == EndOfFrames(70)


@pytest.mark.parametrize("kind", KINDS)
async def test_close_wakes_whoever_waits(kind: str) -> None:
    near, far = await pair(kind)
    woken = []

    async def read() -> None:
        with trio.move_on_after(5):
            await near.drain()
            woken.append("read")

    async def write() -> None:
        with trio.move_on_after(5):
            await near.flush()
            woken.append("write")

    with closing(far):
        for seq in range(1, 30):
            near.write(opaque(seq, 1 << 20))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            nursery.start_soon(write)
            await trio.sleep(0.05)
            near.close()
        assert sorted(woken) == ["read", "write"]
        near.close()  # again is nothing new


async def test_no_thread_outlives_its_stream() -> None:
    near, far = await pair("socket")
    for seq in range(1, 30):  # far's reader waits to be relieved, near's writer for far
        near.write(opaque(seq, 1 << 20))
    await trio.sleep(0.05)
    assert len(threads()) >= 1
    near.close()
    far.close()
    with trio.fail_after(2):
        await end_of_threads()


def test_no_thread_outlives_trio() -> None:
    async def main() -> None:
        near, _ = await pair("socket")
        for seq in range(1, 30):
            near.write(opaque(seq, 1 << 20))
        await trio.sleep(0.05)

    trio.run(main)
    deadline = time.monotonic() + 2
    while threads() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert not threads()


async def test_a_stream_that_was_closed_at_once_never_runs() -> None:
    ours, theirs = await tcp_pair()
    start_stream(ours, Role.SOURCE).close()
    assert await theirs.recv(1) == b""
    theirs.close()
    await end_of_threads()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_reset_is_a_loss_with_a_reason(kind: str) -> None:
    near, far = await pair(kind)
    with closing(near), trio.fail_after(10):
        near.write(opaque(1, 10))
        await near.flush()
        await trio.sleep(0.01)
        far.close()  # with a frame unread
        while not near.lost:
            near.write(opaque(2, 100_000))
            await trio.sleep(0.01)
        assert near.lost in {"Connection reset by peer", "Broken pipe"}
        assert await near.next() is None or near.lost


@pytest.mark.parametrize("kind", KINDS)
async def test_drain_waits_for_the_other_ends_last_byte_and_keeps_nothing(kind: str) -> None:
    near, far = await pair(kind)
    with closing(near), closing(far), trio.fail_after(10):
        for seq in range(1, 20):
            near.write(opaque(seq, 1 << 20))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(far.drain)
            await near.flush()
            near.end()
        assert far.connection.received_bytes == near.written_bytes


async def test_little_is_written_at_once_without_a_thread() -> None:
    near, far = await pair("socket")
    with closing(near), closing(far):
        near.write(encode_frame(FrameType.BYE, 0, b""))
        assert near.unwritten_bytes == 0


# --- several connections as one link --------------------------------------------------------------


@asynccontextmanager
async def linked(
    streams: int, kind: str = "socket"
) -> AsyncIterator[tuple[Link, Link, list[tuple[LinkStream, LinkStream]]]]:
    """Both ends of a link of several connections; and the connections."""
    pairs = [await pair(kind) for _ in range(streams)]
    source = Link(pairs[0][0], LinkSession(Role.SOURCE), "migrate-dst")
    destination = Link(pairs[0][1], LinkSession(Role.DESTINATION), "migrate-src")
    with closing(source), closing(destination):
        await source.send(replace(HELLO, streams=streams))
        assert isinstance(await destination.receive(), Hello)
        token = TOKEN if streams > 1 else b""
        await destination.send(replace(welcome(), streams=streams, join_token=token))
        assert isinstance(await source.receive(), Welcome)
        for number, (near, far) in enumerate(pairs[1:], 1):
            admitted = destination.session.admit(source.session.join(number))
            assert admitted == messages.Joined()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(source.join, near, number)
                frame = await far.next()
                assert isinstance(frame, Frame)
                destination.admit(far, number)
        assert source.stream_count == destination.stream_count == streams
        yield source, destination, pairs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streams", [1, 3, 16])
async def test_messages_are_striped_and_arrive_in_order(streams: int, kind: str) -> None:
    batch = large_batch()
    async with linked(streams, kind) as (source, destination, pairs):
        before = [near.written_bytes for near, _ in pairs]

        async def send() -> None:
            await source.send(TABLE)
            for number in range(60):
                await source.send(messages.RoundEnd(number) if number % 3 else batch)
            await source.flush()

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                heard: list[Message | None] = [await destination.receive() for _ in range(61)]
        assert heard[0] == TABLE
        assert heard[2::3] == [messages.RoundEnd(n) for n in range(60) if n % 3 == 1]
        used = [near.written_bytes - b for (near, _), b in zip(pairs, before, strict=True)]
        assert sum(count > (1 << 20) for count in used) >= min(streams, 2)
        assert source.written_bytes == source.sent_bytes == destination.received_bytes
        assert destination.session.sequence.held_bytes == 0


def large_batch() -> messages.OpaqueData:
    return messages.OpaqueData(3, bytes(1 << 20), 1 << 20)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [0, 1, 2])
async def test_the_loss_of_any_connection_is_the_loss_of_the_link(number: int) -> None:
    async with linked(3) as (_, destination, pairs):
        pairs[number][0].write([b"\xd7PCL"])
        await pairs[number][0].flush()
        pairs[number][0].close()
        with pytest.raises(PeerLostError), trio.fail_after(5):
            await destination.receive()


async def test_a_further_connection_that_ends_whole_is_no_loss() -> None:
    async with linked(3) as (source, destination, pairs):
        pairs[2][0].close()
        await source.send(messages.KeepAlive())
        await wait_all_tasks_blocked(0.05)
        with trio.fail_after(5):
            assert await destination.receive() == messages.KeepAlive()


async def test_nothing_is_sent_on_a_link_that_was_closed() -> None:
    async with linked(1) as (source, _, _):
        source.close()
        for message in (messages.KeepAlive(), TABLE):
            with pytest.raises(PeerLostError, match="it was closed here"):
                await source.send(message)


async def test_last_words_are_heard_although_another_connection_broke_first() -> None:
    abort = messages.Abort("cancelled", "by the user", "source")
    async with linked(3) as (source, destination, pairs):
        for near, _ in pairs[1:]:
            near.write([b"\xd7PCL"])
            await near.flush()
            near.close()
        with pytest.raises(PeerLostError):
            await destination.receive()
        await source.send(abort)
        assert await destination.last_words() == abort


@pytest.mark.parametrize("number", [0, 1])
async def test_a_connection_that_falls_silent_is_lost_though_others_speak(
    number: int, autojump_clock: MockClock
) -> None:
    near, far = memory_link(LINK)
    other = memory_link(LINK)
    source, destination = await joined_in_memory((near, far), other)
    began = trio.current_time()
    with closing(source), closing(destination):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.keep_alive)
            nursery.start_soon(destination.keep_alive)
            (near if number == 0 else other[0]).cut()
            which = " on connection 1" if number else ""
            with pytest.raises(PeerLostError, match=f"silent for 15 s{which}$"):
                await hear_keep_alives(destination)
            nursery.cancel_scope.cancel()
    took_s = trio.current_time() - began
    assert PEER_SILENCE_S - 0.01 <= took_s < PEER_SILENCE_S + 1.2


async def hear_keep_alives(link: Link) -> None:
    while True:
        assert await link.receive() == messages.KeepAlive(1)


async def joined_in_memory(
    first: tuple[MemorySocket, MemorySocket], second: tuple[MemorySocket, MemorySocket]
) -> tuple[Link, Link]:
    ends = []
    for role, sock in zip(Role, first, strict=True):
        stream = TaskStream(sock, LinkConnection(role)).start()
        ends.append(Link(stream, LinkSession(role), role.value))
    source, destination = ends
    await source.send(replace(HELLO, streams=2))
    await destination.receive()
    await destination.send(replace(welcome(), streams=2, join_token=TOKEN))
    await source.receive()
    destination.session.admit(source.session.join(1))
    near, far = (
        TaskStream(sock, LinkConnection(role)).start()
        for role, sock in zip(Role, second, strict=True)
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.join, near, 1)
        await far.next()
        destination.admit(far, 1)
    return source, destination


async def test_keep_alives_go_over_every_connection(autojump_clock: MockClock) -> None:
    source, destination = await joined_in_memory(memory_link(LINK), memory_link(LINK))
    with closing(source), closing(destination):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.keep_alive)
            heard = [await destination.receive() for _ in range(8)]
            nursery.cancel_scope.cancel()
        assert heard == [messages.KeepAlive(1)] * 8
        assert trio.current_time() == pytest.approx(4 * KEEPALIVE_S, abs=0.5)


async def test_a_stalled_connection_gets_no_frame_while_another_has_room() -> None:
    """Its other end takes nothing: once its buffers are full it has no room, the other has."""
    batch = large_batch()
    async with linked(2) as (source, destination, pairs):
        await source.send(TABLE)
        assert await destination.receive() == TABLE
        stalled, free = pairs
        # the destination takes nothing at all from the first: neither frames nor bytes
        taken = 0
        with trio.fail_after(30):  # frames for the stalled one would be waited for
            while taken <= 20:
                await source.send(batch)
                while isinstance(free[1].take(), Frame):
                    taken += 1
        assert stalled[0].unwritten_bytes + stalled[0].unsent_bytes
        assert isinstance(stalled[0], SocketStream)


async def test_page_batches_survive_the_way_over_several_connections() -> None:
    async with linked(4) as (source, destination, _):
        await source.send(TABLE)
        for _ in range(20):
            await source.send(PAGES)
        assert await destination.receive() == TABLE
        for _ in range(20):
            message = await destination.receive()
            assert message is not None
            assert message.frame_type is FrameType.PAGES
