"""A guest whose disk is served by another process keeps it while its rings are asked for."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from migrate.lab.qemu_binaries import QemuBinary
from migrate.qemu import virtio_queries
from migrate.qemu.qmp_client import QmpClient, open_qmp
from tests.qemu.commands import until, until_true

pytestmark = pytest.mark.qemu

COUNTER = 0x7000
READER = bytes.fromhex(
    # xor ax,ax; mov ds,ax; again: mov si,packet; mov ah,42h; mov dl,80h; int 13h;
    # inc dword [COUNTER]; jmp again: reads one sector after the other through the BIOS.
    "31c08ed8 be207c b442 b280 cd13 66ff060070 ebf0"
)
PACKET = bytes.fromhex("10000100008000000000000000000000")


def boot_disk(path: Path) -> None:
    sector = bytearray(512)
    sector[: len(READER)] = READER
    sector[0x20 : 0x20 + len(PACKET)] = PACKET
    sector[510:] = b"\x55\xaa"
    path.write_bytes(sector + bytes(1 << 20))


@contextmanager
def running(*argv: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(argv)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def sectors_read(monitor: QmpClient) -> int:
    data = await virtio_queries.read_physical(monitor, COUNTER, 4)
    assert data is not None
    return int.from_bytes(data, "little")


async def wait_more(monitor: QmpClient, count: int) -> None:
    async def more() -> bool:
        return await sectors_read(monitor) > count

    with trio.fail_after(30):
        await until(more)


async def test_asking_for_rings_does_not_stop_a_vhost_user_disk(
    short_tmp: Path, qemu72: QemuBinary
) -> None:
    disk, socket, qmp = short_tmp / "disk", short_tmp / "vu", short_tmp / "qmp"
    boot_disk(disk)
    server = running(
        "qemu-storage-daemon",
        *("--blockdev", f"file,node-name=f,filename={disk}"),
        "--export",
        f"type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={socket},writable=on",
    )
    guest = (
        *(str(qemu72.path), "-machine", "q35,memory-backend=m", "-m", "64"),
        *("-object", "memory-backend-memfd,id=m,size=64M,share=on"),
        *("-display", "none", "-nodefaults", "-qmp", f"unix:{qmp},server=on,wait=off"),
        *("-chardev", f"socket,id=c,path={socket}"),
        *("-device", "vhost-user-blk-pci,chardev=c,bootindex=0"),
    )
    with server:
        with trio.fail_after(20):
            await until_true(socket.exists)
        with running(*guest):
            with trio.fail_after(20):
                await until_true(qmp.exists)
            async with open_qmp(qmp) as monitor:
                await wait_more(monitor, 100)
                (device,) = await virtio_queries.query_virtio(monitor) or ()
                (queue,) = device.virtqueues
                assert queue.num == 128
                assert 0 < queue.desc < queue.avail < queue.used < 64 << 20
                # Twice: what was under way when we asked may still come back.
                await wait_more(monitor, await sectors_read(monitor) + 100)
                await wait_more(monitor, await sectors_read(monitor) + 100)
