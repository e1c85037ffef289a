"""Both commands over real TCP that is cut at bytes that were chosen; fences and refusals."""

import contextlib
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from migrate.lab.cutting_proxy import CutPlan, cutting
from migrate.lab.leaks import command_line
from migrate.lab.processes import process_tree
from migrate.lab.soak_cuts import HANDOVER, SIMULATED_OPTIONS, SLOW_OPTIONS, migrate_simulated
from migrate.transport.link import Link
from migrate.transport.socket_stream import start_stream
from migrate.way_back import MOST_TIMES
from proto.link.dispatch import encode_message
from proto.link.frames import FrameType, encode_frame
from proto.link.messages import Message, OldCopy, Resume, RoundEnd
from proto.link.state import Role
from tests.engine.test_reception import CLIENT, Door, closed, link_on, opened
from tests.link_pair import DIGEST, HELLO, TABLE, welcome
from tests.pki import Pki, write_secret

TOKEN = bytes(range(32))
OFFER = replace(HELLO, resume_token=TOKEN, vm_id="vm")


@asynccontextmanager
async def greeted(folder: Path) -> AsyncIterator[tuple[Door, Link, Link]]:
    """A door, a source that passed it, and both ends of its link, which wait for each other."""
    async with opened(folder) as door:
        source = link_on(await door.connect())
        await source.send(OFFER)
        destination, _ = await door.sources.receive()
        await destination.send(replace(welcome(), old_pages=4))
        await source.receive()
        for link in (source, destination):
            link.gives_up = lambda down_s: down_s > 5
        yield door, source, destination
        for link in (source, destination):
            link.close()


async def lose(source: Link) -> None:
    """Have the source find its connection closed."""
    source.stream.close()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(source.receive)
            await source.wait_down()
            nursery.cancel_scope.cancel()


async def reconnect(door: Door, source: Link) -> None:
    assert await source.resume(start_stream(await door.connect(), Role.SOURCE)) is None


def wire(message: Message, seq: int = 0) -> bytes:
    return b"".join(encode_frame(message.frame_type, seq, *encode_message(message)))


async def everything(sock: trio.socket.SocketType) -> bytes:
    data = b""
    while more := await sock.recv(4096):
        data += more
    sock.close()
    return data


async def test_what_was_said_while_there_was_no_link_is_heard_when_there_is_one(
    tmp_path: Path,
) -> None:
    async with greeted(tmp_path) as (door, source, destination):
        await source.send(TABLE)
        assert await destination.receive() == TABLE
        await lose(source)
        await destination.send(OldCopy(0, DIGEST))
        with trio.fail_after(5):
            await reconnect(door, source)
            heard = [await source.receive(), await source.receive()]
        assert heard[1] == OldCopy(0, DIGEST)
        assert (source.cuts.count, destination.cuts.count) == (1, 1)
        assert source.session.window.received_seq == 1


async def test_frames_wait_for_a_link_and_get_no_number_before(tmp_path: Path) -> None:
    async with greeted(tmp_path) as (door, source, destination), trio.open_nursery() as nursery:
        await lose(source)
        nursery.start_soon(source.send, TABLE)
        await trio.sleep(0.02)
        assert source.session.window.sent_seq == 0
        with trio.fail_after(5):
            await reconnect(door, source)
            assert await destination.receive() == TABLE
        assert source.session.sent_bytes["resent"] == 0


async def test_a_half_open_connection_of_before_has_no_way_in(tmp_path: Path) -> None:
    """The source came back; whoever still holds its old connection speaks into the void."""
    async with opened(tmp_path) as door:
        old = await door.connect()
        await old.sendmsg([wire(OFFER)])
        destination, _ = await door.sources.receive()
        destination.gives_up = lambda down_s: down_s > 5
        await destination.send(welcome())
        new = await door.connect()
        await new.sendmsg([wire(Resume(OFFER.migration_id, TOKEN, 1, 0))])
        with trio.fail_after(5):
            while destination.session.epoch == 0:  # noqa: ASYNC110
                await trio.sleep(0.002)
            await old.sendmsg([wire(TABLE, 1)])
            await new.sendmsg([wire(TABLE, 1), wire(RoundEnd(0), 2)])
            assert await destination.receive() == TABLE
            assert await destination.receive() == RoundEnd(0)
        destination.close()
        old.close()
        new.close()


@pytest.mark.parametrize(
    ("said", "code", "why"),
    [
        (Resume(DIGEST, bytes(32), 9, 1), b"unknown", "no migration of this name and token"),
        (Resume(DIGEST, TOKEN[:16], 9, 1), b"unknown", "no migration of this name and token"),
        (Resume(DIGEST[1:] + b"x", TOKEN, 9, 1), b"unknown", "no migration of this name"),
        (Resume(DIGEST, TOKEN, 1, 1), b"old", "epoch 1 of the link has begun"),
    ],
)
async def test_who_may_not_resume_is_told_why_and_costs_nothing(
    tmp_path: Path, said: Resume, code: bytes, why: str
) -> None:
    async with greeted(tmp_path) as (door, source, destination):
        await lose(source)
        await reconnect(door, source)
        account = dict(destination.session.sent_bytes)
        sock = await door.connect()
        await sock.sendmsg([wire(said)])
        assert code in await everything(sock)
        await door.said(2)
        assert door.lines[1].startswith(f"turned away a connection from {CLIENT}: {why}")
        assert destination.session.sent_bytes == account
        assert destination.session.epoch == 1
        await source.send(TABLE)
        assert await destination.receive() == TABLE


async def test_nobody_resumes_before_there_is_a_migration(tmp_path: Path) -> None:
    async with opened(tmp_path) as door:
        sock = await door.connect()
        await sock.sendmsg([wire(Resume(DIGEST, TOKEN, 1, 1))])
        assert b"unknown" in await everything(sock)
        garbled = await door.connect()
        await garbled.sendmsg([wire(Resume(DIGEST, TOKEN, 1, 1))[:-3] + b"\0\0\0"])
        await closed(garbled)
        await door.said(3)


async def test_a_silent_or_lost_link_is_given_up_in_the_end(tmp_path: Path) -> None:
    async with greeted(tmp_path) as (_, source, _):
        source.gives_up = lambda down_s: down_s > 0.3
        source.stream.close()
        with (
            trio.fail_after(5),
            pytest.raises(Exception, match=r"no link since, for 0\.[3-9] s"),
        ):
            await source.receive()
        with pytest.raises(Exception, match="no link since"):
            await source.send(TABLE)


async def test_a_source_whose_streams_are_many_opens_them_all_again(short_tmp: Path) -> None:
    plan = [CutPlan(at_bytes=3_000_000, one=True), CutPlan(at_bytes=9_000_000, how="end")]
    with trio.fail_after(60):
        outcome = await migrate_simulated(short_tmp, plan, streams=3, options=SIMULATED_OPTIONS)
    assert outcome.faults() == []
    assert outcome.arrived
    assert outcome.source["reconnects"] == 2
    assert outcome.source["streams"] == 3
    assert 0 < outcome.source["bytes"]["resent"] < outcome.source["wire_bytes"]


@pytest.mark.parametrize("part", range(3))
async def test_a_handover_is_cut_within_every_message(short_tmp: Path, part: int) -> None:
    plan = [CutPlan(frame=frame, plus_bytes=10) for frame in HANDOVER[part::3]]
    with trio.fail_after(60):
        outcome = await migrate_simulated(short_tmp, plan, options=SIMULATED_OPTIONS)
    assert outcome.faults() == []
    assert outcome.arrived
    assert len(outcome.made) == len(plan)


async def test_greetings_are_cut_and_the_guest_arrives(short_tmp: Path) -> None:
    frames = (FrameType.HELLO, FrameType.RESUME, FrameType.WELCOME, FrameType.RESUMED)
    plan = [CutPlan(frame=frame, plus_bytes=30, how="end") for frame in frames]
    with trio.fail_after(60):
        outcome = await migrate_simulated(short_tmp, plan, options=SIMULATED_OPTIONS)
    assert outcome.faults() == []
    assert (outcome.arrived, len(outcome.made)) == (True, 4)


AGAIN = ("--reconnect-timeout", "30s")
STOPPED = ("--stopped-timeout", "500ms")


@pytest.mark.parametrize(
    ("frame", "plus_bytes", "streams"),
    [
        (FrameType.SWITCHOVER, 0, 1),
        (FrameType.DEVICE_STATE, 40, 3),
        (FrameType.END_OF_STATE, 3, 1),
    ],
)
async def test_a_guest_that_stood_still_too_long_goes_on_and_is_migrated_again(
    short_tmp: Path, frame: FrameType, plus_bytes: int, streams: int
) -> None:
    """It arrives in the memory that the destination has of it, as it was when it last stopped."""
    plan = [CutPlan(frame=frame, plus_bytes=plus_bytes, outage_s=1.5)]
    with trio.fail_after(60):
        outcome = await migrate_simulated(
            short_tmp,
            plan,
            streams=streams,
            options=(*SIMULATED_OPTIONS, *AGAIN, *STOPPED),
            destination_options=AGAIN,
        )
    assert outcome.faults() == []
    assert outcome.arrived
    source = outcome.source
    assert source["back_to_precopy"] == outcome.destination["back_to_precopy"] == 1
    assert source["back_to_precopy_stopped_ms"] >= 500
    assert min(source["downtime"].values()) >= 0
    assert source["reconnects"] == 1
    assert source["streams"] == streams
    # Of the second time over all of memory most is there already.
    assert source["pages"]["same"] > source["pages"]["literal"] / 2
    assert [entry["n"] for entry in source["rounds"]] == list(range(len(source["rounds"])))


async def test_a_guest_goes_back_to_precopy_only_so_often(short_tmp: Path) -> None:
    cut = CutPlan(frame=FrameType.END_OF_STATE, plus_bytes=3, outage_s=1.2)
    with trio.fail_after(90):
        outcome = await migrate_simulated(
            short_tmp,
            [cut] * (MOST_TIMES + 1),
            options=(*SIMULATED_OPTIONS, *AGAIN, *STOPPED),
            destination_options=AGAIN,
        )
    assert outcome.faults() == []
    source = outcome.source
    assert (source["guest_on"], source["guest_state"]) == ("source", "running")
    assert source["back_to_precopy"] == outcome.destination["back_to_precopy"] == MOST_TIMES
    assert source["error"]["code"] == "peer-lost"


async def test_there_is_no_way_back_from_the_end_of_the_stream(short_tmp: Path) -> None:
    """The destination has heard END_OF_STATE; its answer was lost.

    Its acknowledgement may be lost, too: then the guest goes on before that is known.
    """
    plan = [CutPlan(frame=FrameType.VERIFIED, plus_bytes=3, outage_s=1.5)]
    with trio.fail_after(60):
        outcome = await migrate_simulated(
            short_tmp,
            plan,
            options=(*SIMULATED_OPTIONS, *AGAIN, *STOPPED),
            destination_options=AGAIN,
        )
    assert outcome.faults() == []
    source, destination = outcome.source, outcome.destination
    assert (source["guest_on"], source["guest_state"]) == ("source", "running")
    assert destination["guest_on"] == "source"
    assert source["back_to_precopy"] == destination["back_to_precopy"] == 0
    if source["back_to_precopy_stopped_ms"]:
        assert source["error"]["code"] == "deadline"
        assert "has got the end of its stream" in destination["error"]["message"]
    else:
        assert source["error"]["code"] == "peer-lost"


async def test_a_link_that_stays_away_leaves_the_guest_at_the_source(short_tmp: Path) -> None:
    plan = [CutPlan(frame=FrameType.END_OF_STATE, plus_bytes=3, outage_s=60)]
    waits = ("--reconnect-timeout", "2s")
    with trio.fail_after(60):
        outcome = await migrate_simulated(
            short_tmp,
            plan,
            options=(*SIMULATED_OPTIONS, *waits, "--stopped-timeout", "1s"),
            destination_options=waits,
        )
    assert outcome.faults() == []
    source = outcome.source
    assert (source["guest_on"], source["guest_state"]) == ("source", "running")
    assert source["error"]["code"] == "peer-lost"
    assert "no link since" in source["error"]["message"]
    assert outcome.codes[0] == 11


async def follow_open(seen: dict[str, list[tuple[int, int]]]) -> None:
    """Note of each of the two commands how many descriptors and threads it has, until cancelled."""
    while True:
        for pid in process_tree([os.getpid()]):
            words = command_line(pid)
            for name, counts in seen.items():
                if f"/{name} " in words:
                    with contextlib.suppress(OSError):  # it ended
                        folder = Path(f"/proc/{pid}")
                        counts.append(
                            (len(list(folder.glob("fd/*"))), len(list(folder.glob("task/*"))))
                        )
        await trio.sleep(0.05)


async def test_cuts_leave_no_descriptors_and_no_threads_in_the_commands(
    short_tmp: Path,
) -> None:
    """24 cuts: one of either left at each would make 12 more in the second half."""
    plan = [
        CutPlan(at_bytes=900_000 * number, how="end" if number % 3 else "reset")
        for number in range(1, 25)
    ]
    seen: dict[str, list[tuple[int, int]]] = {"migrate-src": [], "migrate-dst": []}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow_open, seen)
        with trio.fail_after(100):
            outcome = await migrate_simulated(short_tmp, plan, options=SIMULATED_OPTIONS)
        nursery.cancel_scope.cancel()
    assert outcome.arrived
    assert len(outcome.made) == len(plan)
    for counts in seen.values():
        half = len(counts) // 2
        (files, threads), (later_files, later_threads) = (
            map(max, *part) for part in (counts[:half], counts[half:])
        )
        assert files > 3
        assert later_files <= files + 4
        assert later_threads <= threads + 4


async def test_an_outage_in_precopy_is_waited_out(short_tmp: Path) -> None:
    plan = [CutPlan(at_bytes=2_000_000, outage_s=2)]
    traces = [short_tmp / "src.jsonl", short_tmp / "dst.jsonl"]
    with trio.fail_after(60):
        outcome = await migrate_simulated(
            short_tmp,
            plan,
            options=(*SLOW_OPTIONS, "--trace", str(traces[0])),
            destination_options=("--trace", str(traces[1])),
        )
    assert outcome.arrived
    assert outcome.source["outage_ms"] >= 2000
    for trace, report in zip(traces, (outcome.source, outcome.destination), strict=True):
        events = [json.loads(line) for line in trace.read_text().splitlines()]
        (lost,) = (event for event in events if event["event"] == "cut")
        (back,) = (event for event in events if event["event"] == "link-back")
        assert lost["cause"] == report["cuts"][0]["cause"]
        assert back["outage_ms"] == report["outage_ms"]
        assert back["t_ms"] - lost["t_ms"] >= 2000 - 1


async def test_a_proxy_without_a_plan_changes_nothing() -> None:
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")

        async def echo(stream: trio.SocketStream) -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                async for data in stream:
                    await stream.send_all(data)

        nursery.start_soon(trio.serve_listeners, echo, [listener])
        port = listener.socket.getsockname()[1]
        plan = [CutPlan(at_bytes=300_007)]
        async with cutting(port, plan) as proxy:
            stream = await trio.open_tcp_stream("127.0.0.1", proxy.port)
            heard = 0
            await stream.send_all(bytes(100_000))
            while heard < 100_000:
                heard += len(await stream.receive_some(65536))
            assert proxy.done == []
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(bytes(1000))
                while await stream.receive_some(65536):
                    await stream.send_all(bytes(1000))
            await stream.aclose()
            assert proxy.forwarded_bytes == 300_007
            assert proxy.done == plan
        nursery.cancel_scope.cancel()


async def test_a_cut_link_comes_back_through_tls_and_token(short_tmp: Path, pki: Pki) -> None:
    """And is cut in the admission of its connections, too."""
    token = write_secret(short_tmp / "token", b"0123456789abcdef" * 4)
    tls = pki.directory(short_tmp / "tls")
    secure = ("--tls-dir", str(tls), "--token-file", str(token))
    places = (700, 3_000, 6_000, 400_000, 401_000, 404_000, 9_000_000)
    plan = [CutPlan(at_bytes=at, one=at % 2 == 0) for at in places]
    with trio.fail_after(100):
        outcome = await migrate_simulated(
            short_tmp,
            plan,
            streams=3,
            options=(*SIMULATED_OPTIONS, *secure),
            destination_options=secure,
        )
    assert outcome.faults() == []
    assert outcome.arrived
    assert len(outcome.made) == len(plan)
