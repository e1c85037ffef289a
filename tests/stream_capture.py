"""Records migration streams of a tiny guest, byte by byte as a QEMU writes them.

The guest is a firmware of our own: it writes 112 pages from 64 KiB on, all different, and then
halts or goes on writing them. So a stream is small, and no foreign firmware is in it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from migrate.qemu import queries
from migrate.qemu.qmp_client import QmpClient
from proto.qemu.return_path import shut

RAM_KIB: Final = 5128
"""A multiple of 8 KiB, which QEMU rounds up to, and none of 256 KiB: with such RAM, QEMU 7.2
under TCG loses dirty pages."""

RAM_BYTES: Final = RAM_KIB * 1024
MACHINE_TYPES: Final = {"7.2": "pc-q35-7.2", "10.0": "pc-q35-10.0"}
UUID: Final = "00112233-4455-6677-8899-aabbccddeeff"

# cli; 1: mov bx,0x1000; 2: mov ds,bx; mov [0],bx; inc word [0x800];
# add bx,0x100; cmp bx,0x8000; jb 2
WRITE_PAGES: Final = bytes.fromhex("fa bb0010 8edb 891e0000 ff060008 81c30001 81fb0080 72ec")
AGAIN: Final = bytes.fromhex("ebe7")
HALT: Final = bytes.fromhex("f4 ebfd")
JUMP_TO_START: Final = bytes.fromhex("ea 0000 00f0")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a stream is made.

    Attributes:
        arguments: Of QEMU, beside the machine; ``DIR/`` stands for a private directory.
        capabilities: Migration capabilities to switch on.
        return_path: Capability return-path; the capture then answers SHUT at the end.
        channels: Connections that QEMU makes (multifd), the main one first.
        busy: The firmware never stops writing, and the migration makes several rounds.
        versions: QEMU versions that know it.
        parameters: Migration parameters to set.
        machine: Machine type; by default the newest that the version knows.
    """

    arguments: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    return_path: bool = False
    channels: int = 1
    busy: bool = False
    versions: tuple[str, ...] = ("7.2", "10.0")
    parameters: Mapping[str, str | int] = field(default_factory=dict)
    machine: str = ""


@dataclass(slots=True)
class Capture:
    """What came on each connection, in the order they were accepted."""

    channels: list[bytearray] = field(default_factory=list)


DISK: Final = (
    "-blockdev",
    "qcow2,node-name=disk,file.driver=file,file.filename=DIR/disk.qcow2",
)

MULTIFD_RECIPES: Final[Mapping[str, Recipe]] = {
    f"multifd-{name}": Recipe(
        capabilities=("multifd",),
        channels=channels,
        busy=True,
        parameters={"multifd-channels": channels - 1} | dict(parameters),
        versions=("10.0",) if "zero" in name or machine else ("7.2", "10.0"),
        machine=machine,
    )
    for name, channels, parameters, machine in (
        ("busy", 3, {}, ""),
        ("single", 2, {}, ""),
        ("zlib", 3, {"multifd-compression": "zlib"}, ""),
        ("zstd", 3, {"multifd-compression": "zstd"}, ""),
        ("zero-legacy", 3, {"zero-page-detection": "legacy"}, ""),
        ("zero-none", 3, {"zero-page-detection": "none"}, ""),
        ("old-machine", 4, {}, "pc-q35-7.2"),
    )
}
"""Recorded with all their connections."""

RECIPES: Final[Mapping[str, Recipe]] = {
    "plain": Recipe(("-device", "virtio-balloon-pci")),
    "return-path": Recipe(return_path=True),
    "devices": Recipe(
        (
            *("-device", "pcie-root-port,id=root0,chassis=1"),
            *(
                "-netdev",
                "user,id=net",
                "-device",
                "virtio-net-pci,netdev=net,bus=root0,romfile=",
            ),
            *("-device", "VGA,vgamem_mb=1,romfile="),
            *("-device", "virtio-scsi-pci,id=scsi"),
            *("-blockdev", "null-co,node-name=null,size=1048576,read-zeroes=on"),
            *("-device", "scsi-hd,drive=null,bus=scsi.0"),
            *("-uuid", UUID),
        )
    ),
    "ignore-shared": Recipe(
        (
            *(
                "-object",
                f"memory-backend-file,id=mem,size={RAM_KIB}K,mem-path=DIR/ram,share=on",
            ),
            *("-machine", "memory-backend=mem", "-uuid", UUID),
        ),
        ("x-ignore-shared", "validate-uuid"),
    ),
    "xbzrle": Recipe(capabilities=("xbzrle",), busy=True),
    "compress": Recipe(capabilities=("compress",), versions=("7.2",)),
    "multifd": Recipe(capabilities=("multifd",), channels=3),
    "bitmap": Recipe(
        (*DISK, "-device", "virtio-blk-pci,drive=disk"), capabilities=("dirty-bitmaps",)
    ),
}


def firmware(*, busy: bool) -> bytes:
    """A 64 KiB BIOS image."""
    code = WRITE_PAGES + (AGAIN if busy else HALT)
    return (code.ljust(0xFFF0, b"\0") + JUMP_TO_START).ljust(0x10000, b"\0")


async def machine_arguments(recipe: Recipe, machine: str, folder: Path) -> list[str]:
    """QEMU's arguments for a guest of this recipe; makes the files it needs in ``folder``."""
    bios = folder / "bios.bin"
    await trio.Path(bios).write_bytes(firmware(busy=recipe.busy))
    if any("disk.qcow2" in argument for argument in recipe.arguments):
        await make_disk(folder / "disk.qcow2")
    own = [argument.replace("DIR", str(folder)) for argument in recipe.arguments]
    return ["-machine", machine, "-m", f"{RAM_KIB}K", "-bios", str(bios), *own]


async def make_disk(path: Path) -> None:
    """A small qcow2 image with a persistent dirty bitmap."""
    image = str(path)
    await trio.run_process(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"])
    await trio.run_process(["qemu-img", "bitmap", "--add", image, "map"])


async def start_guest(client: QmpClient) -> None:
    """Let the firmware run until it wrote its last page."""
    await queries.cont(client)
    last_page = 0x7F800
    while not await read_word(client, last_page):  # noqa: ASYNC110  guest memory has no event
        await trio.sleep(0.01)


async def read_word(client: QmpClient, address: int) -> int:
    """Read 16 bits of guest memory."""
    line = {"command-line": f"xp /1hx {address:#x}"}
    text = await client.execute("human-monitor-command", **line)
    assert isinstance(text, str)
    return int(text.split(":")[1], 16)


async def capture(client: QmpClient, recipe: Recipe, folder: Path) -> list[bytes]:
    """Migrate the guest into our hands; the source is complete and its RAM frozen afterwards."""
    capabilities = dict.fromkeys(recipe.capabilities, True)
    await queries.set_capabilities(client, capabilities | {"return-path": recipe.return_path})
    if recipe.parameters:
        await queries.set_parameters(client, recipe.parameters)
    if recipe.busy:
        slow = {"max-bandwidth": 4 << 20, "downtime-limit": 1}
        await queries.set_parameters(client, slow)
    path = folder / "stream.sock"
    taken = Capture()
    with trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(str(path))
        listener.listen(recipe.channels)
        async with trio.open_nursery() as nursery:
            await queries.migrate(client, f"unix:{path}")
            if recipe.busy:
                nursery.start_soon(_let_go_after, client, 5)
            for _ in range(recipe.channels):
                sock, _ = await listener.accept()
                data = bytearray()
                taken.channels.append(data)
                nursery.start_soon(_read_channel, sock, data, recipe.return_path)
    path.unlink()
    while (await queries.query_migrate(client)).status != "completed":  # noqa: ASYNC110
        await trio.sleep(0.01)
    return [bytes(data) for data in taken.channels]


async def _let_go_after(client: QmpClient, syncs: int) -> None:
    """Hold the guest in pre-copy until its dirty bitmap was synced so often, if it can be held."""
    while True:
        status = await queries.query_migrate(client)
        if status.has_ended or (status.ram and status.ram.dirty_sync_count >= syncs):
            break
        await trio.sleep(0.01)
    await queries.set_parameters(client, {"max-bandwidth": 1 << 30, "downtime-limit": 2000})


async def _read_channel(
    sock: trio.socket.SocketType, data: bytearray, return_path: bool
) -> None:
    """Read to the end of file; with a return path QEMU waits for SHUT when it wrote all."""
    with sock:
        while True:
            piece = b""
            with trio.move_on_after(1 if return_path else 60) as waiting:
                piece = await sock.recv(1 << 20)
            if waiting.cancelled_caught:
                assert return_path
                assert data.endswith(b"}"), "the source stopped in the middle of its stream"
                await sock.send(shut(0))
            elif not piece:
                return
            data += piece


def shown_command(arguments: Sequence[str], folder: Path) -> str:
    """The command line without paths of this machine."""
    return " ".join(arguments).replace(f"{folder}/", "")
