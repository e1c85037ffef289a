"""A real QEMU loads what was read and written again, and then holds the source's RAM."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from migrate.params import UnixAddress
from migrate.qemu import queries
from migrate.qemu.loader import QemuLoader
from migrate.qemu.local_hop import OutgoingHop
from migrate.qemu.qmp_client import QmpClient, open_qmp
from migrate.transport.channels import connect
from proto.guest_events import DeviceState, GuestEvent, Opaque, OpaqueKind, PageRun
from proto.qemu.format import MAGIC
from tests.multifd_streams import read as read_multifd
from tests.qemu_streams import flat, read
from tests.small_qemu import QEMUS, running_qemu
from tests.stream_capture import (
    MACHINE_TYPES,
    MULTIFD_RECIPES,
    RAM_BYTES,
    RECIPES,
    Recipe,
    capture,
    machine_arguments,
    start_guest,
)

pytestmark = pytest.mark.qemu

PAIRS = [("7.2", "7.2"), ("10.0", "10.0"), ("7.2", "10.0"), ("10.0", "7.2")]
pairs = pytest.mark.parametrize(("source", "destination"), PAIRS)
RAM_FILE = "ram.bin"


@dataclass(frozen=True, slots=True)
class Captured:
    """The bytes of each connection, and the RAM of the source that wrote them, frozen since."""

    connections: list[bytes]
    ram: bytes

    @property
    def stream(self) -> bytes:
        return self.connections[0]

    def events(self) -> list[GuestEvent]:
        """What is read of it, to its end."""
        if len(self.connections) > 1:
            return [event for interval in read_multifd(self.connections) for event in interval]
        events, consumed = read(self.stream, range(0, len(self.stream), 100_003))
        assert consumed == len(self.stream)
        return events


def machine_of(source: str, destination: str) -> str:
    """The newest machine type that both know."""
    return MACHINE_TYPES["7.2" if "7.2" in (source, destination) else "10.0"]


@asynccontextmanager
async def guest(
    folder: Path, recipe: Recipe, version: str, machine: str, *more: str
) -> AsyncIterator[QmpClient]:
    folder.mkdir()
    arguments = await machine_arguments(recipe, machine, folder)
    async with (
        running_qemu(folder, *arguments, *more, qemu=QEMUS[version]) as (path, _),
        open_qmp(path) as client,
    ):
        yield client


async def ram_of(client: QmpClient, folder: Path) -> bytes:
    path = folder / RAM_FILE
    await queries.pmemsave(client, address=0, size_bytes=RAM_BYTES, path=path)
    return await trio.Path(path).read_bytes()


async def captured(folder: Path, recipe: Recipe, version: str, machine: str) -> Captured:
    async with guest(folder, recipe, version, machine) as client:
        await start_guest(client)
        connections = await capture(client, recipe, folder)
        connections.sort(key=lambda data: not data.startswith(MAGIC))
        return Captured(connections, await ram_of(client, folder))


async def load(client: QmpClient, events: list[GuestEvent], folder: Path) -> QemuLoader:
    """Load events as the engine's destination does: the end of the stream last and apart."""
    path = folder / "incoming.sock"
    await queries.migrate_incoming(client, f"unix:{path}")
    loader = QemuLoader(OutgoingHop(await connect(UnixAddress(path), "the destination QEMU")))
    state = b"".join(event.data for event in events if isinstance(event, DeviceState))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loader.read_return_path)
        await loader.load(events[:-1])
        await loader.mark(1)
        assert await loader.wait_consumed(0) == 1
        if state:
            await loader.load_devices(state, 2)
        await loader.load_end()
        nursery.cancel_scope.cancel()
    loader.close()
    return loader


async def replay(
    tmp_path: Path, recipe: Recipe, source: str, destination: str
) -> tuple[Captured, list[GuestEvent], bytes]:
    """Capture, decode, write again; returns what was loaded and the RAM that is there then."""
    machine = machine_of(source, destination)
    with trio.fail_after(60):
        taken = await captured(tmp_path / "source", recipe, source, machine)
        events = taken.events()
        folder = tmp_path / "destination"
        incoming = ("-incoming", "defer")
        async with guest(folder, recipe, destination, machine, *incoming) as client:
            own = [name for name in recipe.capabilities if name in ("compress", "xbzrle")]
            await queries.set_capabilities(client, dict.fromkeys(own, True))
            await load(client, events, folder)
            while (await queries.query_migrate(client)).status != "completed":  # noqa: ASYNC110
                await trio.sleep(0.01)
            assert not (await queries.query_run_state(client)).running
            return taken, events, await ram_of(client, folder)


def assert_same_ram(found: bytes, expected: bytes) -> None:
    """Name the first differing page instead of printing megabytes."""
    different = [
        at
        for at in range(0, RAM_BYTES, 4096)
        if found[at : at + 4096] != expected[at : at + 4096]
    ]
    assert not different
    assert len(found) == len(expected) == RAM_BYTES
    assert sum(page.strip(b"\0") != b"" for page in pages_of(expected)) > 112


def pages_of(ram: bytes) -> list[bytes]:
    return [ram[at : at + 4096] for at in range(0, len(ram), 4096)]


@pairs
@pytest.mark.parametrize("variant", ["plain", "return-path", "devices"])
async def test_the_ram_of_a_loaded_stream_is_the_sources(
    tmp_path: Path, variant: str, source: str, destination: str
) -> None:
    taken, events, ram = await replay(tmp_path, RECIPES[variant], source, destination)
    assert not any(isinstance(e, Opaque) and e.kind >= OpaqueKind.REST for e in events)
    assert_same_ram(ram, taken.ram)


@pytest.mark.parametrize("version", list(QEMUS))
async def test_many_rounds_of_a_busy_guest_arrive(tmp_path: Path, version: str) -> None:
    taken, events, ram = await replay(tmp_path, Recipe(busy=True), version, version)
    assert sum(op[0] == "round" for op in flat(events)) > 1
    assert sum(len(e.pages) for e in events if isinstance(e, PageRun)) > 3 * 112
    assert_same_ram(ram, taken.ram)


@pairs
async def test_pages_that_came_over_several_connections_arrive(
    tmp_path: Path, source: str, destination: str
) -> None:
    recipe = MULTIFD_RECIPES["multifd-busy"]
    taken, events, ram = await replay(tmp_path, recipe, source, destination)
    assert len(taken.connections) == 3
    assert sum(op[0] == "round" for op in flat(events)) > 1
    assert_same_ram(ram, taken.ram)


@pytest.mark.parametrize("variant", ["zlib", "zstd", "zero-none", "zero-legacy"])
async def test_all_ways_to_send_pages_over_several_connections_arrive(
    tmp_path: Path, variant: str
) -> None:
    version = "7.2" if variant == "zlib" else "10.0"
    recipe = MULTIFD_RECIPES[f"multifd-{variant}"]
    taken, _, ram = await replay(tmp_path, recipe, version, version)
    assert_same_ram(ram, taken.ram)


@pairs
async def test_xbzrle_in_the_middle_of_ram_goes_through(
    tmp_path: Path, source: str, destination: str
) -> None:
    taken, events, ram = await replay(tmp_path, RECIPES["xbzrle"], source, destination)
    assert reasons(events) == [(OpaqueKind.REST_IN_RAM, "xbzrle")]
    assert any(isinstance(event, PageRun) for event in events)
    assert_same_ram(ram, taken.ram)


async def test_compressed_pages_go_through(tmp_path: Path) -> None:
    taken, events, ram = await replay(tmp_path, RECIPES["compress"], "7.2", "7.2")
    assert reasons(events) == [(OpaqueKind.REST_IN_RAM, "compress")]
    assert_same_ram(ram, taken.ram)


@pairs
async def test_a_section_of_unknown_length_goes_through(
    tmp_path: Path, source: str, destination: str
) -> None:
    taken, events, ram = await replay(tmp_path, RECIPES["bitmap"], source, destination)
    assert reasons(events) == [(OpaqueKind.REST, "dirty-bitmap")]
    assert b"\3map" in taken.stream, "the bitmap itself is in the stream"
    assert_same_ram(ram, taken.ram)


def reasons(events: list[GuestEvent]) -> list[tuple[OpaqueKind, str]]:
    """Why the stream was not understood: the capability or section named in the reason."""
    words = ("xbzrle", "compress", "dirty-bitmap")
    given = [event for event in events if isinstance(event, Opaque) and event.reason]
    return [(e.kind, next(word for word in words if word in e.reason)) for e in given]
