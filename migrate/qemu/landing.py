"""Direct landing: pages are written straight into the RAM of a destination QEMU on this host.

A migration stream need not contain every page: what is absent stays as it is in the destination. So
migrate-dst writes the pages of main memory into the QEMU's own memory while that waits for its
stream, and the stream carries the rest. Nothing about the QEMU has to be arranged for it.

Where the memory is, its monitor says; that this is true is tried with a few random bytes before
the migration is agreed on. Wherever anything is amiss, pages go through the stream.
"""

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from migrate.errors import GuestError, LandingError
from migrate.qemu import queries, virtio_queries
from migrate.qemu.answers import Fields, execute_list
from migrate.qemu.process_memory import ProcessMemory
from migrate.qemu.qmp_client import QmpClient
from proto.guest_events import PAGE_SIZE
from proto.qemu.physical import MemoryRange, PhysicalMap

ZERO_PIECE_PAGES: Final = 256
"""Pages looked at in one piece when they are to become zero."""

PROOF_BYTES: Final = 64
"""Random bytes that the QEMU must see where we wrote them."""

_ZEROS: Final = np.zeros((ZERO_PIECE_PAGES, PAGE_SIZE), np.uint8)


class QemuRam:
    """One RAM block of a QEMU, by its place in that process; see ``migrate.pages.landed``."""

    def __init__(
        self, memory: ProcessMemory, base: int, page_count: int, *, fresh: bool
    ) -> None:
        self._memory = memory
        self._base = base
        self._scratch = np.empty((ZERO_PIECE_PAGES, PAGE_SIZE), np.uint8)
        self.page_count = page_count
        self.fresh = fresh

    def write(self, pages: NDArray[np.uint32], data: NDArray[np.uint8]) -> None:
        """See ``LandedBlock``."""
        self._memory.write_pages(self._base, self._checked(pages), data)

    def read_into(self, pages: NDArray[np.uint32], out: NDArray[np.uint8]) -> None:
        """See ``LandedBlock``."""
        self._memory.read_pages(self._base, self._checked(pages), out)

    def zero(self, pages: NDArray[np.uint32]) -> None:
        """See ``LandedBlock``."""
        for start in range(0, len(pages), ZERO_PIECE_PAGES):
            part = pages[start : start + ZERO_PIECE_PAGES]
            there = self._scratch[: len(part)]
            self.read_into(part, there)
            dirty = part[there.view(np.uint64).any(axis=1)]
            if len(dirty):
                self.write(dirty, _ZEROS[: len(dirty)])

    def _checked(self, pages: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Guard the process: beside its RAM lies the rest of it."""
        if int(pages[-1]) >= self.page_count:
            raise LandingError(f"page {pages[-1]} is outside of the guest's RAM")
        return pages


@dataclass(frozen=True, slots=True)
class Landing:
    """Blocks of a QEMU that pages can be written into.

    Attributes:
        blocks: By name; empty where there is no way.
        missing: Why ``blocks`` is empty, else empty.
    """

    blocks: dict[str, QemuRam]
    missing: str = ""


async def find_landing(client: QmpClient, pid: int, *, fresh: bool) -> Landing:
    """Find the RAM of a QEMU that waits for its stream, and prove that it is the right place.

    Args:
        client: Its monitor.
        pid: Its process.
        fresh: Its RAM is known to be all zero.
    """
    memory = None
    try:
        memory = ProcessMemory(pid)
        blocks = {
            name: await _find_block(client, memory, name, size, fresh=fresh)
            for name, size in await _main_memory(client)
        }
        if blocks:
            return Landing(blocks)
        missing = "the QEMU names no main memory"
    except (GuestError, OSError) as error:
        missing = str(error)
    if memory is not None:
        memory.close()
    return Landing({}, missing)


async def _main_memory(client: QmpClient) -> list[tuple[str, int]]:
    """Names and sizes of the RAM blocks that are memory back-ends: main memory and DIMMs."""
    command = "query-memdev"
    sizes = {}
    for item in await execute_list(client, command):
        fields = Fields(command, item)
        if (name := fields.text_or_none("id")) is not None:
            sizes[name] = fields.integer("size")
    found = await queries.query_ram_blocks(client)
    return [
        (block.idstr, block.used_bytes)
        for block in found
        if block.used_bytes == sizes.get(block.idstr)
    ]


async def _find_block(
    client: QmpClient, memory: ProcessMemory, name: str, size: int, *, fresh: bool
) -> QemuRam:
    """Locate one block.

    Raises:
        LandingError: It cannot be found, is not ours to write, or is not what the QEMU says.
    """
    where = _mapped_range(await virtio_queries.query_physical_map(client, (name,)), name)
    region, address = await virtio_queries.query_host_address(client, where.start)
    if region != name:
        raise LandingError(f"guest address {where.start:#x} is {region!r}, expected {name!r}")
    base = address - where.offset
    maps = Path(f"/proc/{memory.pid}/maps").read_text("ascii", "replace")
    if not is_writable(maps, base, size):
        raise LandingError(f"process {memory.pid} has no {size} bytes of RAM at {base:#x}")
    ram = QemuRam(memory, base, size // PAGE_SIZE, fresh=fresh)
    await _prove(client, ram, where)
    return ram


def _mapped_range(physical: PhysicalMap, name: str) -> MemoryRange:
    for item in physical.ranges:
        if item.block == name and not (item.start | item.offset) % PAGE_SIZE:
            return item
    raise LandingError(f"RAM block {name!r} is nowhere in the guest's memory")


def is_writable(maps: str, start: int, size: int) -> bool:
    """Whether a process may write all of an area itself, by the text of its ``/proc/PID/maps``."""
    reached, end = start, start + size
    for line in maps.splitlines():
        area, rights = line.split(" ", 2)[:2]
        first, behind = (int(item, 16) for item in area.split("-"))
        if first <= reached < behind and rights.startswith("rw"):
            reached = behind
        if reached >= end:
            return True
    return False


async def _prove(client: QmpClient, ram: QemuRam, where: MemoryRange) -> None:
    """Write random bytes where the block should be, and see that the QEMU has them there.

    Raises:
        LandingError: It has not; the memory is as it was.
    """
    page = np.array([where.offset // PAGE_SIZE], np.uint32)
    before = np.empty((1, PAGE_SIZE), np.uint8)
    ram.read_into(page, before)
    proof = secrets.token_bytes(PROOF_BYTES)
    written = before.copy()
    written[0, :PROOF_BYTES] = np.frombuffer(proof, np.uint8)
    ram.write(page, written)
    try:
        seen = await virtio_queries.read_physical(client, where.start, PROOF_BYTES)
    finally:
        ram.write(page, before)
    if seen != proof:
        raise LandingError("the QEMU does not see what was written to its memory")
