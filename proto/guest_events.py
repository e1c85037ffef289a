"""The vocabulary between a guest and the engine.

A source guest (a real QEMU or a simulated one) yields these events in stream order; a destination
guest consumes the same set. Everything that is not guest RAM stays verbatim bytes.
"""

import enum
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PAGE_SIZE = 4096
"""Target page size in bytes; the only one on x86."""

RUN_PAGES = 256
MAX_RUN_PAGES = 1024
"""Most pages with data in one event, on a slow link and on any: 1 to 4 MiB, the unit of work of the
whole engine. Each costs the same, however many pages it has; but it also delays what comes behind
it, and a slow link should not see megabytes at a time."""

MAX_ZERO_RUN_PAGES = 65536
"""Most pages in one ``ZeroRun``; they carry no data, so the bound only limits index arrays."""


def run_pages(burst_bytes: int) -> int:
    """Pages with data in one event where so many bytes are read at a time."""
    return min(max(burst_bytes // PAGE_SIZE, RUN_PAGES), MAX_RUN_PAGES)


@dataclass(frozen=True, slots=True)
class RamBlock:
    """One named region of guest RAM.

    Attributes:
        idstr: QEMU's name of the block, e.g. ``pc.ram``.
        used_length: Bytes in use; a multiple of ``PAGE_SIZE``.
    """

    idstr: str
    used_length: int

    @property
    def page_count(self) -> int:
        """Number of target pages in the block."""
        return self.used_length // PAGE_SIZE


@dataclass(frozen=True, slots=True)
class RamBlocks:
    """The guest's RAM blocks; comes before any page and numbers the blocks by position.

    Attributes:
        blocks: In stream order; a page event's ``block`` is an index into it.
        start: The bytes of the stream that announced them, verbatim (QEMU: the whole START
            section).
    """

    blocks: tuple[RamBlock, ...]
    start: bytes


@dataclass(frozen=True, slots=True, eq=False)
class PageRun:
    """Up to ``MAX_RUN_PAGES`` pages of one block with their content.

    Attributes:
        block: Index into ``RamBlocks.blocks``.
        pages: Page numbers in the block, shape (n,), strictly increasing.
        data: Page contents, shape (n, 4096), a private copy owned by the receiver of the event.
    """

    block: int
    pages: NDArray[np.uint32]
    data: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class ZeroRun:
    """Pages of one block that are all zero; ``pages`` as in ``PageRun``."""

    block: int
    pages: NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class RoundEnd:
    """A walk over the dirty bitmap ended; the scan starts again at the first block.

    Attributes:
        round_no: Number of the round that ended, 0 = bulk.
    """

    round_no: int


@dataclass(frozen=True, slots=True)
class Switchover:
    """The guest is stopped from here on: stop-and-copy begins.

    Attributes:
        prelude: Bytes that must precede the end of RAM on the destination and must not reach it
            before (QEMU 10: the SWITCHOVER_START command), verbatim; usually empty.
    """

    prelude: bytes = b""


@dataclass(frozen=True, slots=True)
class SwitchoverRevoked:
    """The guest runs on at the source: what came since ``Switchover``, but for pages, is void.

    No guest yields it; a destination guest is told so.
    """


class OpaqueKind(enum.IntEnum):
    """What opaque bytes are, as far as the engine must know (wire numbers, never reused)."""

    HEADER = 1
    """Start of the stream: magic, version, machine configuration."""
    OPEN_RETURN_PATH = 2
    """The command that opens the destination's return path."""
    COMMAND = 3
    """Any other command between sections."""
    REST = 4
    """Nothing behind this point is understood: bytes to pass on as they come."""
    REST_IN_RAM = 5
    """As ``REST``, beginning inside a RAM section whose header the destination must have open."""


@dataclass(frozen=True, slots=True)
class Opaque:
    """Bytes of the stream that are not RAM pages, verbatim and in place.

    Attributes:
        kind: Which part of the stream they are.
        data: The bytes.
        reason: For the first ``REST``/``REST_IN_RAM`` event, why the stream is not understood.
    """

    kind: OpaqueKind
    data: bytes
    reason: str = ""


@dataclass(frozen=True, slots=True)
class DeviceState:
    """A piece of the tail after the last RAM section, verbatim; pieces come in order."""

    data: bytes


@dataclass(frozen=True, slots=True)
class End:
    """Everything was yielded; nothing follows.

    Attributes:
        run_state: QEMU's run state string from the device state (``running``, ``paused``, …),
            ``None`` where it could not be read.
    """

    run_state: str | None


GuestEvent = (
    RamBlocks
    | PageRun
    | ZeroRun
    | RoundEnd
    | Switchover
    | SwitchoverRevoked
    | Opaque
    | DeviceState
    | End
)


class NeedData(enum.Enum):
    """Result of a reader that wants more bytes before it can yield another event."""

    NEED_DATA = enum.auto()


NEED_DATA = NeedData.NEED_DATA
