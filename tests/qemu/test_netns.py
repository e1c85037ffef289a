"""The lab's link: two namespaces, a rate, counters, and nothing left behind."""

import json
import os
import re
import subprocess
from pathlib import Path
from socket import IPPROTO_TCP, TCP_CONGESTION

import pytest
import trio

from migrate.errors import GuestError
from migrate.lab.netns import NAMESPACE_FILES, Namespace, netns_pair

pytestmark = pytest.mark.qemu  # needs root like the rest of the lab

PAYLOAD_BYTES = 1_000_000


def ours() -> set[str]:
    names = (
        {path.name for path in NAMESPACE_FILES.iterdir()} if NAMESPACE_FILES.is_dir() else set()
    )
    return {name for name in names if name.startswith(f"migrate-lab-{os.getpid()}-")}


def qdisc(end: Namespace) -> dict[str, object]:
    command = ["tc", "-n", end.name, "-j", "qdisc", "show", "dev", end.interface]
    done = subprocess.run(command, capture_output=True, check=True)
    found: dict[str, object] = json.loads(done.stdout)[0]
    return found


async def test_pair_is_there_inside_the_block_and_gone_after() -> None:
    async with netns_pair() as pair:
        assert ours() == {pair.source.name, pair.destination.name}
    assert ours() == set()


async def test_tcp_on_the_link_has_the_congestion_control_that_was_asked_for() -> None:
    async with netns_pair(congestion_control="reno") as pair:
        with pair.destination.open_socket() as listener, pair.source.open_socket() as sender:
            listener.bind((pair.destination.address, 0))
            listener.listen()
            sender.connect(listener.getsockname())
            receiver, _ = listener.accept()
            with receiver:
                chosen = [
                    end.getsockopt(IPPROTO_TCP, TCP_CONGESTION, 16)
                    for end in (sender, receiver)
                ]
    assert [name.rstrip(b"\0") for name in chosen] == [b"reno", b"reno"]


async def test_pair_is_removed_after_an_error_in_the_block() -> None:
    with pytest.raises(ZeroDivisionError):
        async with netns_pair():
            _ = 1 // 0
    assert ours() == set()


async def test_pair_is_removed_when_cancelled() -> None:
    with trio.CancelScope() as scope:
        async with netns_pair():
            scope.cancel()
            await trio.sleep_forever()
    assert ours() == set()


async def test_namespaces_of_a_killed_run_are_removed_by_the_next() -> None:
    # The largest process id Linux can have is 2^22, so this process never lived.
    abandoned = "migrate-lab-4194305-src"
    await trio.run_process(["ip", "netns", "add", abandoned])
    async with netns_pair():
        assert not (NAMESPACE_FILES / abandoned).exists()


async def test_counters_see_what_a_command_in_the_namespace_sends() -> None:
    async with netns_pair() as pair:
        listener = trio.socket.from_stdlib_socket(pair.destination.open_socket())
        with listener:
            await listener.bind((pair.destination.address, 0))
            listener.listen(1)
            port = listener.getsockname()[1]
            before = await pair.source.sent_bytes()
            words = (
                f"head -c {PAYLOAD_BYTES} /dev/zero >/dev/tcp/{pair.destination.address}/{port}"
            )
            async with trio.open_nursery() as nursery:
                argv = pair.source.command(["bash", "-c", words])
                nursery.start_soon(trio.run_process, argv)
                receiver, _ = await listener.accept()
                with receiver:
                    received = 0
                    while data := await receiver.recv(65536):
                        received += len(data)
            sent = await pair.source.sent_bytes() - before
    assert received == PAYLOAD_BYTES
    assert PAYLOAD_BYTES < sent < PAYLOAD_BYTES * 1.2


async def test_shape_sets_a_rate_in_both_directions_and_lifts_it() -> None:
    async with netns_pair() as pair:
        plain = qdisc(pair.source)["kind"]
        await pair.shape(25_000_000)
        for end in (pair.source, pair.destination):
            assert qdisc(end)["kind"] == "tbf"
            assert qdisc(end)["options"]["rate"] == 25_000_000  # type: ignore[index]
        await pair.shape(None)
        await pair.shape(None)
        assert qdisc(pair.source)["kind"] == qdisc(pair.destination)["kind"] == plain


async def test_a_shaped_link_carries_data_and_no_more_than_its_rate() -> None:
    async with netns_pair() as pair:
        await pair.shape(2_500_000)
        rate = await pair.measure_bytes_per_s(0.5)
    # Loosely: a slow machine stays below, only a filter that does not work gets above.
    assert 0 < rate < 2 * 2_500_000


async def test_launcher_becomes_the_program_inside_the_namespace(tmp_path: Path) -> None:
    async with netns_pair() as pair:
        launcher = pair.destination.write_launcher(tmp_path / "run", Path("/bin/bash"))
        words = 'echo "$$"; ip -o addr show'
        process = await trio.lowlevel.open_process(
            [str(launcher), "-c", words], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        output = b"".join([bytes(chunk) async for chunk in process.stdout]).decode()
        await process.wait()
    assert output.splitlines()[0] == str(process.pid)
    assert re.search(
        rf"{pair.destination.interface}\s+inet {pair.destination.address}/", output
    )


def test_a_removed_namespace_cannot_be_entered() -> None:
    with pytest.raises(GuestError, match="cannot enter"):
        Namespace("migrate-lab-nowhere", "link-src", "10.77.1.1").open_socket()
