"""A real guest over TLS; and the directories of ``tls-init`` are good for QEMU's own TLS, too."""

import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from migrate.lab.host_certificates import initialise
from tests.pki import Pki, write_secret
from tests.qemu.commands import QEMU, Bench, runs
from tests.qemu.counting_guest import kernel

pytestmark = pytest.mark.qemu

NOISE = {"noise_mib": 4, "hot_pages": 32}


@asynccontextmanager
async def tapped(port: int, heard: bytearray) -> AsyncIterator[int]:
    """A port that leads to another one; whatever passes is written down."""

    async def copy(source: trio.SocketStream, target: trio.SocketStream) -> None:
        async for data in source:
            heard.extend(data)
            await target.send_all(data)
        await target.send_eof()

    async def relay(near: trio.SocketStream) -> None:
        far = await trio.open_tcp_stream("127.0.0.1", port)
        async with far, trio.open_nursery() as nursery:
            nursery.start_soon(copy, near, far)
            nursery.start_soon(copy, far, near)

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, relay, 0, host="127.0.0.1"))
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def test_a_guest_arrives_and_nobody_on_the_way_sees_it(pki: Pki, short_tmp: Path) -> None:
    token = write_secret(short_tmp / "token", b"not to be read on the way, 32 bytes")
    tls_dir = str(pki.directory(short_tmp / "tls"))
    secured = ["--tls-dir", tls_dir, "--token-file", str(token)]
    async with Bench.open(short_tmp) as bench:
        source = await bench.source(**NOISE)
        dst = await bench.destination(*secured, qemu=bench.qemu_command(**NOISE))
        await bench.say(dst.port, b"GET / HTTP/1.1\r\n\r\n")
        heard = bytearray()
        async with tapped(dst.port, heard) as port:
            src = await bench.start_source(source, port, *secured, "--compress", "none")
            assert await src.wait() == 0, src.text
            assert await dst.wait() == 0, dst.text
        assert src.report["integrity"]["equal"]
        assert "migrate-src at 127.0.0.1 does not speak TLS" in dst.text
        assert await runs(await bench.monitor_of(dst))
        assert await source.stands_still()
    # The guest's program is in its memory.
    program = kernel(**NOISE)[64:]
    assert len(heard) > 4 << 20
    assert program not in heard
    assert b"\xd7PCL" not in heard
    assert token.read_bytes() not in heard


async def test_without_tls_everybody_on_the_way_sees_it(short_tmp: Path) -> None:
    """What the test above looks for can be found."""
    async with Bench.open(short_tmp) as bench:
        source = await bench.source(**NOISE)
        dst = await bench.destination(qemu=bench.qemu_command(**NOISE))
        heard = bytearray()
        async with tapped(dst.port, heard) as port:
            src = await bench.start_source(source, port, "--compress", "none")
            assert await src.wait() == 0, src.text
            assert await dst.wait() == 0, dst.text
    assert kernel(**NOISE)[64:] in heard


@pytest.mark.parametrize("endpoint", ["server", "client"])
def test_qemu_takes_the_same_directory(short_tmp: Path, endpoint: str) -> None:
    (folder,) = initialise(short_tmp / "pki", [["alpha", "10.0.0.1"]], days=1)
    machine = ["-nodefaults", "-machine", "none", "-display", "none", "-S", "-qmp", "stdio"]
    commands = [{"execute": "qmp_capabilities"}, {"execute": "quit"}]
    creds = f"tls-creds-x509,id=tls,dir={folder},endpoint={endpoint},verify-peer=on"
    ended = subprocess.run(
        [QEMU, *machine, "-object", creds],
        input="\n".join(map(json.dumps, commands)),
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
