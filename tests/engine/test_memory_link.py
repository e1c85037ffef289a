"""The link in memory: how fast, how late, how much at a time, and what an end sees of the other."""

import socket

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from migrate.transport.channels import TCP_NOTSENT_LOWAT, send_views
from migrate.transport.memory_link import MemoryLinkParams, MemorySocket, memory_link
from migrate.units import KIB, MIB

LINK = MemoryLinkParams(bandwidth_bps=100_000_000, delay_ms=10)


async def send(sock: MemorySocket, *buffers: bytes) -> None:
    await send_views(sock, [memoryview(buffer) for buffer in buffers])


async def receive(sock: MemorySocket, count: int) -> bytes:
    data = b""
    scratch = bytearray(MIB)
    while len(data) < count:
        got = await sock.recv_into(memoryview(scratch)[: count - len(data)])
        assert got, f"the end after {len(data)} of {count} bytes"
        data += scratch[:got]
    return data


def pattern(length: int) -> bytes:
    return bytes(range(251)) * (length // 251 + 1)


async def test_bytes_arrive_in_order_at_the_links_rate_and_one_delay_later(
    autojump_clock: MockClock,
) -> None:
    near, far = memory_link(LINK)
    data = pattern(10_000_000)[:10_000_000]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, near, data[:1000], data[1000:2000], data[2000:])
        assert await receive(far, len(data)) == data
    assert trio.current_time() == pytest.approx(0.1 + 0.010, abs=1e-6)


async def test_both_directions_carry_at_once(autojump_clock: MockClock) -> None:
    near, far = memory_link(LINK)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, near, bytes(5 * MIB))
        nursery.start_soon(send, far, bytes(5 * MIB))
        nursery.start_soon(receive, near, 5 * MIB)
        nursery.start_soon(receive, far, 5 * MIB)
    assert trio.current_time() == pytest.approx(5 * MIB / LINK.bandwidth_bps + 0.010, abs=1e-4)


async def test_small_message_takes_one_delay(autojump_clock: MockClock) -> None:
    near, far = memory_link(LINK)
    await send(near, b"ping")
    assert trio.current_time() == 0
    assert await receive(far, 4) == b"ping"
    assert trio.current_time() == pytest.approx(0.010, abs=1e-6)


async def test_sender_is_held_back_by_what_is_unsent_and_not_by_what_is_under_way(
    autojump_clock: MockClock,
) -> None:
    near, far = memory_link(LINK)
    near.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, 200_000)
    assert await near.sendmsg([memoryview(bytes(MIB))]) == 200_000
    assert trio.current_time() == 0
    assert await near.sendmsg([memoryview(bytes(MIB))]) == 100_000
    assert trio.current_time() == pytest.approx(0.001, abs=1e-6)
    assert await receive(far, 300_000) == bytes(300_000)


async def test_reader_is_woken_for_as_much_as_it_asked_for(autojump_clock: MockClock) -> None:
    near, far = memory_link(LINK)
    far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 50_000)
    await send(near, bytes(60_000))
    assert await far.recv_into(bytearray(MIB)) == 50_000
    assert trio.current_time() == pytest.approx(0.0105, abs=1e-6)


async def test_receive_buffer_that_nobody_reads_stops_the_line(
    autojump_clock: MockClock,
) -> None:
    near, far = memory_link(MemoryLinkParams(100_000_000, 10, receive_buffer_bytes=256 * KIB))
    sent = 0

    async def send_on() -> None:
        nonlocal sent
        while True:
            sent += await near.sendmsg([memoryview(bytes(64 * KIB))])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_on)
        await trio.sleep(100)
        held = sent
        assert 256 * KIB < held <= 256 * KIB + 128 * KIB
        assert await receive(far, 64 * KIB) == bytes(64 * KIB)
        await trio.sleep(100)
        assert sent == held + 64 * KIB
        nursery.cancel_scope.cancel()


async def test_small_receive_buffer_bounds_the_rate_by_the_round_trip(
    autojump_clock: MockClock,
) -> None:
    near, far = memory_link(MemoryLinkParams(1_000_000_000, 10, receive_buffer_bytes=MIB))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, near, bytes(10 * MIB))
        await receive(far, 10 * MIB)
    assert 9 * 0.020 < trio.current_time() < 11 * 0.020


async def test_content_is_as_it_was_when_it_was_sent(autojump_clock: MockClock) -> None:
    near, far = memory_link(LINK)
    data = bytearray(b"before")
    await send_views(near, [memoryview(data)])
    data[:] = b"after!"
    assert await receive(far, 6) == b"before"


async def test_end_comes_behind_the_data(autojump_clock: MockClock) -> None:
    near, far = memory_link(LINK)
    await send(near, b"last words")
    near.shutdown(socket.SHUT_WR)
    assert await receive(far, 10) == b"last words"
    assert await far.recv_into(bytearray(10)) == 0
    await send(far, b"heard")
    assert await receive(near, 5) == b"heard"


async def test_closed_end_is_seen_by_who_reads_and_by_who_writes(
    autojump_clock: MockClock,
) -> None:
    near, far = memory_link(LINK)
    far.close()
    assert await near.recv_into(bytearray(10)) == 0
    assert trio.current_time() == pytest.approx(0.010, abs=1e-6)
    with pytest.raises(BrokenPipeError):
        await send(near, b"hello?")
    with pytest.raises(trio.ClosedResourceError):
        await far.recv_into(bytearray(10))


async def test_close_with_bytes_unread_resets(autojump_clock: MockClock) -> None:
    near, far = memory_link(LINK)
    await send(far, b"on its way")
    await send(near, b"never read")
    far.close()
    await trio.sleep(0.010)
    with pytest.raises(ConnectionResetError):
        await near.recv_into(bytearray(10))
    with pytest.raises(OSError, match="not connected"):
        near.shutdown(socket.SHUT_WR)


async def test_close_wakes_who_waits(autojump_clock: MockClock) -> None:
    near, far = memory_link(LINK)

    async def expect_closed() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await near.recv_into(bytearray(10))

    async def fill() -> None:
        with pytest.raises(BrokenPipeError):
            await send(far, bytes(20 * MIB))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fill)
        await trio.sleep(10)
        near.close()
    near, far = memory_link(LINK)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect_closed)
        await trio.testing.wait_all_tasks_blocked()
        near.close()


async def test_cut_link_is_silent(autojump_clock: MockClock) -> None:
    near, far = memory_link(LINK)
    await send(near, b"lost on the way")
    near.cut()
    with trio.move_on_after(100) as waiting:
        await far.recv_into(bytearray(10))
    assert waiting.cancelled_caught
    with trio.move_on_after(100) as waiting:
        await send(near, bytes(20 * MIB))
    assert waiting.cancelled_caught


@pytest.mark.parametrize(
    "wrong", [{"bandwidth_bps": 0}, {"delay_ms": -1}, {"receive_buffer_bytes": 1}]
)
def test_link_that_cannot_be_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected a"):
        MemoryLinkParams(**wrong)
