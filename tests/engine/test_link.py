"""A link on a real connection: who is lost, who broke the protocol, and the last words."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from migrate.errors import PeerLostError, PeerProtocolError
from migrate.session import wait_stalled
from migrate.transport.link import Link
from migrate.transport.socket_stream import start_stream
from migrate.transport.stream import LinkStream
from migrate.transport.traffic import PEER_SILENCE_S
from proto.link import messages
from proto.link.messages import CommitKind, Hello, Message, Welcome
from proto.link.session import LinkSession
from proto.link.state import Role
from tests.link_pair import HELLO, PAGES, TABLE, welcome


@pytest.fixture
def quick_clock() -> MockClock:
    """Jumps once nothing happens; what travels over loopback meanwhile has time to arrive."""
    return MockClock(autojump_threshold=0.05)


async def pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    """Both ends of a connection."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        port = listener.socket.getsockname()[1]
        near = await trio.open_tcp_stream("127.0.0.1", port)
        return near, await listener.accept()


def opened(stream: trio.SocketStream, role: Role) -> LinkStream:
    return start_stream(stream.socket, role)


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Link, trio.SocketStream]]:
    """A source's link, and the bare other end of its connection."""
    near, far = await pair()
    link = Link(opened(near, Role.SOURCE), LinkSession(Role.SOURCE), "migrate-dst")
    with closing(link):
        async with far:
            yield link, far


@asynccontextmanager
async def linked() -> AsyncIterator[tuple[Link, Link]]:
    """Both ends, greeted, with a RAM block table on its way."""
    async with connected() as (source, far):
        stream = opened(far, Role.DESTINATION)
        destination = Link(stream, LinkSession(Role.DESTINATION), "migrate-src")
        await source.send(HELLO)
        assert isinstance(await destination.receive(), Hello)
        await destination.send(welcome(CommitKind.HELD))
        assert isinstance(await source.receive(), Welcome)
        await source.send(TABLE)
        assert await destination.receive() == TABLE
        with closing(destination):
            yield source, destination


async def test_silent_peer_is_lost(quick_clock: MockClock) -> None:
    async with linked() as (source, _):
        before = trio.current_time()
        with pytest.raises(PeerLostError, match="migrate-dst has been silent for 15 s"):
            await source.receive()
        assert 0 <= trio.current_time() - before - PEER_SILENCE_S < 1


async def test_stall_is_seen_and_slowness_is_none(autojump_clock: MockClock) -> None:
    async def move(steps: list[int]) -> None:
        for _ in range(5):
            await trio.sleep(20)
            steps.append(1)

    before, steps = trio.current_time(), list[int]()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(move, steps)
        await wait_stalled(lambda: len(steps), 30)
    assert len(steps) == 5
    assert 130 <= trio.current_time() - before < 135


async def test_keep_alives_keep_an_idle_link(quick_clock: MockClock) -> None:
    async with linked() as (source, destination), trio.open_nursery() as nursery:
        nursery.start_soon(source.keep_alive)
        before = trio.current_time()
        while trio.current_time() - before < 2 * PEER_SILENCE_S:
            assert await destination.receive() == messages.KeepAlive(1)
        nursery.cancel_scope.cancel()


async def test_peer_that_closes_is_lost() -> None:
    async with linked() as (source, destination):
        destination.close()
        with pytest.raises(PeerLostError, match="closed the connection in the middle of the"):
            await source.receive()


async def test_stranger_that_closes_has_not_introduced_itself() -> None:
    async with connected() as (source, far):
        await far.send_eof()
        with pytest.raises(PeerLostError, match="closed the connection before it introduced"):
            await source.receive()


async def test_garbage_breaks_the_protocol() -> None:
    async with connected() as (source, far):
        await source.send(HELLO)
        await far.send_all(b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n")
        for _ in range(2):
            with pytest.raises(PeerProtocolError, match="migrate-dst broke the link protocol"):
                await source.receive()


async def test_send_to_a_peer_that_left_says_so_every_time() -> None:
    async with linked() as (source, destination):
        destination.close()
        with pytest.raises(PeerLostError, match="lost the connection to migrate-dst: "):
            await send_forever(source)
        with pytest.raises(PeerLostError, match="lost the connection to migrate-dst: "):
            await source.send(PAGES)
        await source.try_send(messages.Bye())


async def test_last_words_arrive_although_much_was_sent_to_who_said_them() -> None:
    abort = messages.Abort("cancelled", "cancelled by SIGINT", "source")

    async def give_up(link: Link) -> None:
        await link.farewell(abort)
        link.close()

    async with linked() as (source, destination), trio.open_nursery() as nursery:
        for _ in range(20):
            await source.send(PAGES)
        nursery.start_soon(give_up, destination)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(20):
            await source.send(PAGES)
        assert await source.last_words() == abort
        source.close()


async def test_message_that_crosses_the_peers_abort_is_no_bug_of_ours() -> None:
    async with linked() as (source, destination):
        await destination.send(messages.Abort("cancelled", "cancelled by SIGINT", "source"))
        assert isinstance(await source.receive(), messages.Abort)
        with pytest.raises(PeerLostError, match="migrate-dst has ended the migration"):
            await source.send(PAGES)


async def test_no_last_words() -> None:
    async with linked() as (source, destination):
        destination.close()
        assert await source.last_words() is None


async def send_forever(link: Link) -> None:
    while True:
        await link.send(PAGES)


async def test_cancelled_message_is_finished_before_the_next() -> None:
    async with linked() as (source, destination):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_forever, source)
            await trio.testing.wait_all_tasks_blocked(0.1)
            nursery.cancel_scope.cancel()
        sent = source.session.window.sent_seq
        received: list[Message] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                source.try_send, messages.Abort("cancelled", "no more", "source")
            )
            while not (received and isinstance(received[-1], messages.Abort)):
                message = await destination.receive()
                assert message is not None
                received.append(message)
        assert destination.session.sequence.received_seq == sent


async def test_farewell_that_is_not_legal_is_not_sent() -> None:
    async with linked() as (source, _):
        await source.try_send(messages.Bye())
        await source.send(PAGES)
